"""What a run folder says, in words: its files read with patience, the outcome in a sentence, and what to beware of.

Knows the files of a run folder; does not draw, sample or print.
"""

from __future__ import annotations

import math

from ..runs.record import Record, Row, value
from .numbers import number


def before_training(run: Record, key: str) -> tuple[float, float]:
    """Reward or J of the untouched model and its standard error: the evaluation at iteration 0, or J_ref (KL 0)."""
    first = run.evaluations[0] if run.evaluations else {}
    if first.get("iteration") == 0:
        return value(first, key), value(first, f"{key}_se")
    return value(run.reference, "objective/J_ref"), value(run.reference, "objective/J_ref_se")


def _trusted(run: Record) -> bool:
    """Whether the share recovered means something: J* is known, or its estimate rests on enough samples."""
    return "objective/J_star_exact" in run.reference or bool(run.reference.get("objective/trusted"))


def headline(run: Record) -> str:
    """The outcome in a sentence, every number from the folder."""
    last = run.evaluations[-1] if run.evaluations else {}
    before, before_error = before_training(run, "reward/heldout")
    after, error = value(last, "reward/heldout"), value(last, "reward/heldout_se")
    done = last.get("iteration", 0)
    if not done:
        return f"No result yet: no held-out evaluation after training began. The reward before it is {number(before)}."
    if not math.isfinite(after):
        return f"Held-out reward is not a number at iteration {done}: the run has failed."
    if not math.isfinite(before):
        text = f"Held-out reward is {number(after)}"
    elif abs(after - before) <= 1.96 * math.hypot(error, before_error):
        text = f"Held-out reward did not change measurably: {number(before)} before, {number(after)} after"
        gain, gain_error = value(last, "reward/heldout_prompts_gain"), value(last, "reward/heldout_prompts_gain_se")
        if abs(gain) > 1.96 * gain_error:  # the same noise before and after, which the two figures' errors leave out
            word = "rose" if gain > 0 else "fell"
            text = f"Held-out reward {word}, by {number(gain)} on the same noise: {number(before)} before, "
            text += f"{number(after)} after"
    else:
        text = f"Held-out reward {'rose' if after > before else 'fell'} from {number(before)} to {number(after)}"
    if math.isfinite(error):
        text += f" (95% interval {number(after - 1.96 * error)} to {number(after + 1.96 * error)})"
    if math.isfinite(kl := value(last, "policy/kl")):
        text += f"; path KL {number(kl)} nats"
    if any(row.get("guard") == "unmoved" and row.get("iteration") == done for row in run.guard):
        text += ", so that the policy has hardly moved"
    share = value(last, "objective/recovered")
    if math.isfinite(share) and _trusted(run):
        text += f"; {100 * share:.0f}% of the possible J*\u00a0-\u00a0J_ref recovered"
    return text + "."


def what_happened(run: Record) -> list[str]:
    """What the guard saw, in sentences: each finding, how far the samples drifted, and at which price of path KL."""
    found = [f"Iteration {row.get('iteration')}: {row.get('text')}" for row in run.guard]
    last = run.evaluations[-1] if run.evaluations else {}
    done, mode = last.get("iteration", 0), run.config.get("guard", "off")
    if not done:
        return found
    if all(row.get("guard") in ("note", "unmoved") for row in run.guard):
        found.append(
            "The guard was off." if mode == "off" else
            "The guard found nothing wrong: held-out J did not fall, the path KL paid for itself, diversity stayed, and no "
            "watched metric of the judge worsened beyond its noise."
        )  # fmt: skip
    if (best := run.result.get("best_iteration")) and best != done:
        found.append(f"best/ holds the weights of iteration {best}.")
    if math.isfinite(gain := value(last, "reward/heldout_prompts_gain")):
        error, count = (
            value(last, "reward/heldout_prompts_gain_se"),
            number(int(value(run.reference, "prompts/heldout"))),
        )
        sure = "" if abs(gain) > 1.96 * error else ", which is within its noise"
        found.append(
            f"On {count} prompts that training never saw, the reward changed by {number(gain)} (95% interval "
            f"{number(gain - 1.96 * error)} to {number(gain + 1.96 * error)}){sure}: the same noise before and after."
        )
    if run.reference.get("objective/pooled"):
        found.append(
            "J* and KL* are pooled over prompts, which have too few samples of the reference by themselves: rewards are taken "
            "to vary around each prompt's mean by one law."
        )
    if math.isfinite(drift := value(last, "drift/frechet")):
        floor = value(last, "drift/frechet_floor")
        own = f"; of the pretrained model's from themselves, another seed, {number(floor)}" if floor == floor else ""
        found.append(f"Frechet distance of the samples from the pretrained model's: {number(drift)}{own}.")
    if target := run.config.get("target_kl", 0.0):
        price = value(run.iterations[-1], "policy/kl_weight") if run.iterations else math.nan
        found.append(
            f"Path KL was steered to {number(target)} nats and is {number(value(last, 'policy/kl'))}; in training a nat cost "
            f"{number(price)} in the end. J and J* are at kl_weight {number(run.config.get('kl_weight'))} throughout."
        )
    return found


def warnings(run: Record) -> list[str]:
    """What a reader must know before believing the headline."""
    found = list(run.problems)
    done, planned = (run.iterations[-1].get("iteration", 0) if run.iterations else 0), run.config.get("iterations", "?")
    if run.result.get("stopped"):
        found.append(f"The run stopped early, at iteration {done} of {planned}: {run.result['stopped']}")
    elif not run.result:
        found.append(f"The run is unfinished: {done} of {planned} iterations so far. `scoreact resume` continues it.")
    share = value(run.evaluations[-1], "objective/recovered") if run.evaluations else math.nan
    if run.reference and not _trusted(run):
        means_little = f", so the share recovered ({100 * share:.0f}%) means little" if math.isfinite(share) else ""
        effective = number(value(run.reference, "objective/effective_samples"))
        where = "pooled over prompts" if run.reference.get("objective/pooled") else "in the prompt with fewest"
        if run.reference.get("objective/unsteady_reward"):
            found.append(
                f"J* is not to be trusted{means_little}: a sample's reward is not always the same. It depends on the others of "
                "its batch, or on chance, and no number of samples mends that."
            )
        else:
            found.append(
                f"J* is only a rough estimate{means_little}: {where} it rests on {effective} effective "
                "samples of the reference. A larger kl_weight or more reference_batches make it firmer."
            )
    before, before_error = before_training(run, "objective/J")
    last = run.evaluations[-1] if run.evaluations else {}
    if value(last, "objective/J") < before - 1.96 * math.hypot(before_error, value(last, "objective/J_se")):
        found.append(
            f"J fell from {number(before)} to {number(last['objective/J'])}: the reward gained does not pay for the "
            "path KL. Lower learning_rate or max_kl, or train longer."
        )
    broken = [row.get("iteration") for row in run.iterations if not math.isfinite(value(row, "reward/mean"))]
    if broken:
        found.append(f"The training reward is not a number in {len(broken)} iterations, the first being {broken[0]}.")
    return found + _overfitting(run)


def _overfitting(run: Record) -> list[str]:
    """Held-out reward below its best by more than noise while the training reward rose; J below its best."""
    rows = [row for row in run.evaluations if math.isfinite(value(row, "reward/heldout")) and row.get("iteration")]
    last, found = (rows or [{}])[-1], []

    def fell(key: str) -> Row:
        """The best evaluation if the last one is below it by more than the noise, else {}."""
        best = max(rows, key=lambda row: value(row, key), default={})
        noise = 1.96 * math.hypot(value(best, f"{key}_se"), value(last, f"{key}_se"))
        return best if value(best, key) - value(last, key) > noise else {}

    def training(row: Row) -> float:
        """Mean training reward of the five iterations up to an evaluation."""
        near = [x for x in run.iterations if row["iteration"] - 5 < value(x, "iteration") <= row["iteration"]]
        return sum(value(x, "reward/mean") for x in near) / len(near) if near else math.nan

    if (best := fell("reward/heldout")) and training(last) > training(best):
        found.append(
            f"Held-out reward falls (from {number(best['reward/heldout'])} at iteration {best['iteration']} to "
            f"{number(last['reward/heldout'])} at {last['iteration']}) while the training reward rises: the policy "
            "fits what it was trained on. Prefer the weights in best/."
        )
    if best := fell("objective/J"):
        kept = run.result.get("best_iteration", best["iteration"]) == best["iteration"]  # the guard may prefer others
        found.append(
            f"J was higher at iteration {best['iteration']} ({number(best['objective/J'])}, now "
            f"{number(last['objective/J'])}){'; best/ holds the weights with the highest J' if kept else ''}."
        )
    return found
