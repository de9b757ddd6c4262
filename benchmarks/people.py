"""What a reward of simulated people is worth: the truth is known to them, and the fit has to find it. They are no people.

    python benchmarks/people.py          # makes what is missing in benchmarks/people.jsonl and prints the table
    python benchmarks/people.py --parts pipeline --pipeline shapes    # a folder of `benchmarks/shapes.py pretrain`

Raters answer by Davidson's law. On Fashion-MNIST they like plain pictures, by log p(plain | picture); on the recipe `gaussian`
a point beside the mixture. Each line of the output is one part with one seed, and is not run again.

    chosen    answers to pairs that `choose_pairs` picks, against pairs at random: accuracy on 1000 other pairs, without noise
    candidates  what a fit to 120 answers of them tried: features of each kind, and which it took
    raters    five people of whom one is careless and one leans to the left; a fit that takes them for one person beside it
    gain      the true utility that training gains: to a reward of 500 answers (the five people), and to the true one
    pipeline  the same as `gain` on a small text-to-image pipeline, where they like a picture that shows its caption
    caution   60 answers and a low kl_weight: the true utility along a run on u - c sigma, c 0, 1 and 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.feedback.choosing import PairCandidates, choose_pairs, pairs_within
from scoreact.feedback.evidence import Evidence
from scoreact.feedback.liking import basis_of, fit_reward
from scoreact.feedback.preferences import Compared, Fitted, fit
from scoreact.feedback.simulated import SimulatedRater, simulate
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.base import recipes
from scoreact.recipes.fashion_mnist.recipe import PLAIN, property_reward
from scoreact.recipes.fashion_mnist.recipe import problem as pictures_problem
from scoreact.recipes.gaussian import build, mixture
from scoreact.rewards.bradley_terry import BradleyTerryReward, UtilitySpace
from scoreact.rewards.sample_features import Features, open_features
from scoreact.sampling.draw import draw
from scoreact.training.config import updated
from scoreact.types import Condition

SIZES = (40, 80, 120, 160, 240, 320, 480)  # answers in `chosen`
RATERS = (
    SimulatedRater(tie=-1.0, name="a"), SimulatedRater(tie=-1.0, name="b"), SimulatedRater(tie=-1.0, name="c"),
    SimulatedRater(side=1.5, tie=-1.0, name="left"), SimulatedRater(0.0, tie=-1.0, name="careless"),
)  # fmt: skip
# of the main job a third of its rewards and iterations, for both rewards alike
SHORT: dict[str, Any] = {
    "iterations": 14, "reference_batches": 10, "reuse_reference": 10, "batch_size": 128, "minibatch_size": 128,
    "heldout_samples": 200, "evaluate_every": 14,
}  # fmt: skip
PIPELINE: dict[str, Any] = {  # with as many rewards as in `black_box.py`
    "steps": 10, "algorithm": "ctrl_pathwise", "value": "surrogate", "kl_weight": 0.1, "act_until": 0.7, "kl_states": 64,
    "reference_batches": 6, "minibatch_size": 48, "batch_size": 48, "iterations": 20, "evaluate_every": 20,
    "average": 0.5, "learning_rate": 4e-3, "heldout_samples": 240,
}  # fmt: skip
SEEN = ("convolution", "pixels", "classifier", "denoiser", "network")  # in `candidates`
WANTED = torch.tensor([1.5, 0.5])  # in `caution`


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pictures of the pretrained model, 3000; the last 1000 are for judging."""

    samples: Tensor
    prompts: list[str]
    utility: Tensor
    convolution: Features
    features: Tensor


def pool() -> Pool:
    problem = pictures_problem("plain")
    model, prompts = problem.model, [problem.prompts[i % 10] for i in range(3000)]
    sde, ts = PLAIN.sde(model.schedule), PLAIN.times(model.schedule)
    parts = [
        draw(
            model, prompts[k : k + 250], sampler_by_name(PLAIN.solver), ts, list(range(k, k + 250)),
            torch.device("cpu"), sde.noise,
        )[1].detach()
        for k in range(0, 3000, 250)
    ]  # fmt: skip
    samples, convolution = torch.cat(parts), open_features("convolution", (1, 28, 28))
    utility = property_reward("plain")(samples, Condition(prompts)).double()
    return Pool(samples, prompts, utility, convolution, convolution.in_parts(samples).double())


def joined(pairs: Compared | None, more: Compared) -> Compared:
    if pairs is None:
        return more
    return Compared(*(torch.cat([getattr(pairs, f.name), getattr(more, f.name)]) for f in dataclasses.fields(pairs)))


def reward_of(fitted: Fitted, given: Pool, space: UtilitySpace, basis: Tensor) -> BradleyTerryReward:
    return BradleyTerryReward(given.convolution, space, basis, fitted.weights, fitted.covariance, fitted.precision)


def accuracy(reward: BradleyTerryReward, given: Pool) -> float:
    """On 1000 pairs of pictures that nobody rated, by the true winner."""
    others = pairs_within(given.features[2000:], given.prompts[2000:], torch.Generator().manual_seed(0))
    found, true = reward.utility(others.features, others.prompts), given.utility[2000:]
    right = (found[others.first] > found[others.second]) == (true[others.first] > true[others.second])
    return float(right.double().mean())


def chosen(given: Pool, seed: int) -> dict[str, Any]:
    """Accuracy after so many answers, both ways, of 1000 pairs within 600 pictures."""
    found: dict[str, Any] = {}
    for how in ("random", "chosen"):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(2000, generator=generator)[:600]
        features, prompts = given.features[rows], [given.prompts[i] for i in rows.tolist()]
        open_pairs = pairs_within(features, prompts, generator)
        space = UtilitySpace.of(features, prompts, False)
        basis, design = basis_of(space.vectors(features, prompts))
        free, pairs, reward = torch.ones(len(open_pairs.first), dtype=torch.bool), None, None
        found[how] = []
        for size in SIZES:
            left = torch.nonzero(free)[:, 0]
            some = PairCandidates(features, prompts, open_pairs.first[left], open_pairs.second[left])
            count = size - (0 if pairs is None else len(pairs))
            asked = choose_pairs(reward if how == "chosen" else None, some, count, generator)
            new = left[[row for row, _ in asked]]
            free[new] = False
            answers = simulate(
                [SimulatedRater()], given.utility[rows], open_pairs.first[new], open_pairs.second[new], generator
            )
            pairs = joined(pairs, answers)
            reward = reward_of(fit(design, pairs, precision=0.1), given, space, basis)
            found[how].append(accuracy(reward, given))
    return found


def people(given: Pool, seed: int) -> Evidence:
    """500 answers of the five people, each to a hundred pairs of two pictures of one class."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(200, generator=generator)[:100]
    rows = torch.cat([10 * place[:50] + k for k in range(10)] + [10 * place[50:] + k for k in range(10)])
    order = torch.randperm(500, generator=generator)
    rows = torch.cat([rows[:500][order], rows[500:][order]])
    pairs = simulate(RATERS, given.utility[rows], torch.arange(500), torch.arange(500) + 500, generator)
    return Evidence(
        given.samples[rows], [given.prompts[i] for i in rows.tolist()], pairs, raters=[r.name for r in RATERS],
        group=torch.arange(500), judges=torch.ones(500, dtype=torch.bool),
    )  # fmt: skip


def raters(given: Pool, seed: int) -> dict[str, Any]:
    """What the fit says of each, and the accuracy of fits to all as five, as one, and to the three good ones alone."""
    evidence = people(given, seed)
    features, count = given.convolution.in_parts(evidence.samples).double(), len(RATERS)
    space = UtilitySpace.of(features, evidence.prompts, False)
    basis, design = basis_of(space.vectors(features, evidence.prompts))
    pairs, good = evidence.pairs, evidence.pairs.rater < 3
    one = dataclasses.replace(pairs, rater=0 * pairs.rater, side=0 * pairs.side)
    fits = {"as five": fit(design, pairs, raters=count, precision=0.1), "as one": fit(design, one, precision=0.1)}
    fits["the good ones alone"] = fit(design, one[good], precision=0.1)
    weights, sides = fits["as five"].of_raters(0)[0].exp(), fits["as five"].of_raters(1)[0]
    return {
        "weight": dict(zip([r.name for r in RATERS], weights.tolist(), strict=True)),
        "side": dict(zip([r.name for r in RATERS], sides.tolist(), strict=True)),
        "accuracy": {name: accuracy(reward_of(found, given, space, basis), given) for name, found in fits.items()},
    }


def candidates(given: None, seed: int) -> dict[str, Any]:
    """What a fit to 120 answers of the five people tried: nats an answer above none and accuracy, on answers left out."""
    problem = pictures_problem("plain")
    model, prompts = problem.model, [problem.prompts[i % 10] for i in range(120)] * 2
    sde, ts, seeds = PLAIN.sde(model.schedule), PLAIN.times(model.schedule), [240 * seed + i for i in range(240)]
    samples = draw(model, prompts, sampler_by_name(PLAIN.solver), ts, seeds, torch.device("cpu"), sde.noise)[1].detach()
    utility = property_reward("plain")(samples, Condition(prompts)).double()
    first = torch.arange(120)
    pairs = simulate(RATERS, utility, first, first + 120, torch.Generator().manual_seed(seed))
    judges = torch.ones(120, dtype=torch.bool)
    evidence = Evidence(samples, prompts, pairs, raters=[r.name for r in RATERS], group=first, judges=judges)
    facts = fit_reward(evidence, (), torch.Generator().manual_seed(seed), model).facts
    return {
        "tried": [
            [one["features"], one["log_likelihood"] - one["without_features"], one["accuracy"], one["chosen"]]
            for one in facts["candidates"]
        ]
    }


def gain(given: Pool, seed: int) -> dict[str, Any]:
    """The true utility before and after training to it, and to a reward of answers."""
    liking = fit_reward(people(given, seed))
    found: dict[str, Any] = {"accuracy": liking.facts["accuracy"], "features": liking.features.spec}
    for name in ("true", "answers"):
        problem = pictures_problem("plain")
        true, judge = problem.reward, problem.judge
        assert judge is not None

        def look(samples: Tensor, condition: Condition, true: Any = true, judge: Any = judge) -> dict[str, float]:
            return {**judge(samples, condition), "judge/truth": float(true(samples, condition).mean())}

        own = {} if name == "true" else {"surrogate_target": "reward"}
        result = sa.finetune(
            problem, true if name == "true" else liking, judge=look, config=updated(PLAIN, {**SHORT, **own, "seed": seed}),
            guard="off", progress=False,
        )  # fmt: skip
        looks = [line for line in result.history if line.get("evaluation")]
        kept = ("judge/truth", "judge/property", "judge/frechet", "policy/kl")
        found[name] = [{key: look[key] for key in kept} for look in (looks[0], looks[-1])]
    return found


def of_pipeline(folder: Path, seed: int) -> dict[str, Any]:
    """As `gain`: the truth is log p(caption | picture), answered for 500 pairs of pictures of one caption."""
    from shapes import TASK
    from text_to_image import GUIDANCE, reward

    from scoreact import rewards
    from scoreact.models.pipelines.opening import pipeline_model

    true = rewards.load(reward, folder=str(folder))
    captions = list(TASK.captions)
    found: dict[str, Any] = {}
    liking: BradleyTerryReward | None = None
    for name in ("answers", "true"):
        torch.manual_seed(seed)  # of the adapter's initial weights
        model = pipeline_model(str(folder), lora_rank=4, guidance_scale=GUIDANCE, vae_slicing=False)
        config = updated(sa.Config(), {**PIPELINE, "seed": seed})
        if name == "answers":
            prompts = [captions[i % len(captions)] for i in range(500)] * 2
            sde, ts, parts = config.sde(model.schedule), config.times(model.schedule), []
            for k in range(0, 1000, 100):
                seeds = [1000 * seed + i for i in range(k, k + 100)]
                drawn = draw(
                    model, prompts[k : k + 100], sampler_by_name("ddim"), ts, seeds, torch.device("cpu"), sde.noise
                )
                parts.append(drawn[1].detach())
            samples = torch.cat(parts)
            utility = torch.cat(
                [true(samples[k : k + 100], Condition(prompts[k : k + 100])) for k in range(0, 1000, 100)]
            )
            pairs = simulate(
                RATERS,
                utility.double(),
                torch.arange(500),
                torch.arange(500) + 500,
                torch.Generator().manual_seed(seed),
            )
            liking = fit_reward(Evidence(
                samples, prompts, pairs, raters=[r.name for r in RATERS], group=torch.arange(500),
                judges=torch.ones(500, dtype=torch.bool),
            ))  # fmt: skip
            found |= {"accuracy": liking.facts["accuracy"], "features": liking.features.spec}

        def look(samples: Tensor, condition: Condition) -> dict[str, float]:
            return {"judge/truth": float(true(samples, condition).mean())}

        result = sa.finetune(
            model, true if name == "true" else liking, captions, judge=look, config=config, guard="off", progress=False
        )
        looks = [line for line in result.history if line.get("evaluation")]
        found[name] = [{key: look[key] for key in ("judge/truth", "policy/kl")} for look in (looks[0], looks[-1])]
    return found


def near(samples: Tensor) -> Tensor:
    """The true utility in `caution`: highest at a point beside the mixture."""
    return 2 - (samples - WANTED.to(samples)).square().sum(1)


def caution(given: None, seed: int) -> dict[str, Any]:
    """Evaluations along runs: the reward that is followed, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    law: GaussianMixture = mixture(2, 4, 0)
    samples = law.sample(120, generator)
    pairs = simulate([SimulatedRater()], near(samples).double(), torch.arange(60), torch.arange(60) + 60, generator)
    judges = torch.ones(60, dtype=torch.bool)
    evidence = Evidence(samples, [""] * 120, pairs, group=torch.arange(60), judges=judges)
    liking = fit_reward(evidence, ["convolution"])
    found: dict[str, Any] = {"falls": {}}
    for c in (0, 1, 2):
        torch.manual_seed(seed)  # of the policy's first weights
        seen: list[tuple[Tensor, Tensor]] = []
        reward = dataclasses.replace(liking, caution=float(c))

        def look(samples: Tensor, condition: Condition, seen: Any = seen, reward: Any = reward) -> dict[str, float]:
            seen.append((reward(samples, condition).double(), near(samples).double()))
            return {"judge/truth": float(seen[-1][1].mean())}

        result = sa.finetune(
            dataclasses.replace(build(), optimum=None), reward, judge=look,
            config=recipes()["gaussian"].config, kl_weight=0.1, iterations=24, evaluate_every=3, heldout_samples=300,
            guard="off", kl_limit=1e4, seed=seed, progress=False,
        )  # fmt: skip
        looks = [line for line in result.history if line.get("evaluation")]
        found[str(c)] = [[look[key] for key in ("reward/heldout", "judge/truth", "policy/kl")] for look in looks]
        found["falls"][str(c)] = falls(seen)
    return found


def falls(seen: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The largest fall of the truth from one evaluation to a later one where the reward that is followed has risen.

    Evaluations are of the same noise, so standard errors are those of paired differences; risen is by more than one.
    seen: of each evaluation the rewards and the truths of its samples, [B].
    """
    found = {"fall": 0.0, "error": 0.0}
    for j in range(len(seen)):
        for i in range(j):
            risen, lost = seen[j][0] - seen[i][0], seen[i][1] - seen[j][1]
            if float(risen.mean()) > error_of(risen) and float(lost.mean()) > found["fall"]:
                found = {"fall": float(lost.mean()), "error": error_of(lost)}
    return found


def error_of(values: Tensor) -> float:
    """Of their mean."""
    return float(values.std() / len(values) ** 0.5)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "chosen": chosen, "candidates": candidates, "raters": raters, "caution": caution, "gain": gain, "pipeline": of_pipeline,
}  # fmt: skip


# --- the table -----------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> str:
    """With the standard error over seeds."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{error}"


def table(lines: list[dict[str, Any]]) -> str:
    of = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    rows = ["| what | seeds | found |", "| --- | --- | --- |"]

    def row(part: str, what: str, found: str) -> None:
        rows.append(f"| {what} | {len(of[part])} | {found} |")

    if of["chosen"]:
        curves = {
            how: [statistics.mean(line[how][k] for line in of["chosen"]) for k in range(len(SIZES))]
            for how in ("random", "chosen")
        }
        for how, text in (("random", "pairs at random"), ("chosen", "chosen pairs")):
            shown = ", ".join(f"{size}: {value:.3f}" for size, value in zip(SIZES, curves[how], strict=True))
            row("chosen", f"accuracy by answers, {text}", shown)
        needed = next(
            (s for s, value in zip(SIZES, curves["chosen"], strict=True) if value >= curves["random"][-1]), None
        )
        row("chosen", f"chosen pairs that are as good as {SIZES[-1]} at random", str(needed or "none"))
    for name in SEEN if of["candidates"] else ():
        own = [[one for one in line["tried"] if one[0].split()[0] == name] for line in of["candidates"]]
        best = [max(group, key=lambda one: one[1]) for group in own]
        taken = sum(any(one[3] for one in group) for group in own)
        nats, right = (mean([one[i] for one in best]) for i in (1, 2))
        found = f"{nats}; {right}; taken in {taken}"
        row("candidates", f"{name}: nats an answer above no features, accuracy, both on answers left out", found)
    if of["raters"]:
        for name in (r.name for r in RATERS):
            weights, sides = ([line[key][name] for line in of["raters"]] for key in ("weight", "side"))
            row("raters", f"rater {name}: weight; log odds of left", f"{mean(weights)}; {mean(sides)}")
        for name in ("as five", "as one", "the good ones alone"):
            row(
                "raters",
                f"accuracy of the fit to raters {name}",
                mean([line["accuracy"][name] for line in of["raters"]]),
            )
    for part, where in (("gain", ""), ("pipeline", ", text to image")):
        if not of[part]:
            continue
        gains = {
            name: [line[name][1]["judge/truth"] - line[name][0]["judge/truth"] for line in of[part]]
            for name in ("true", "answers")
        }
        row(part, f"true utility gained, to the true utility{where}", mean(gains["true"]))
        row(part, f"true utility gained, to 500 answers{where}", mean(gains["answers"]))
        shares = [a / t for a, t in zip(gains["answers"], gains["true"], strict=True)]
        row(part, f"share of the gain{where}", f"{mean(shares)}; least {min(shares):.2f}")
    if of["caution"]:
        for c in ("0", "1", "2"):
            ends = [[line[c][0][1], max(look[1] for look in line[c]), line[c][-1][1]] for line in of["caution"]]
            text = "; ".join(
                f"{name} {mean([end[i] for end in ends])}" for i, name in enumerate(("first", "best", "last"))
            )
            worst = max((line["falls"][c] for line in of["caution"]), key=lambda one: one["fall"])
            most = f"{worst['fall']:.2g} ± {worst['error']:.2g}" if worst["fall"] else "0"
            row("caution", f"true utility under u - {c} sigma", f"{text}; most it fell while the reward rose {most}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[p for p in PARTS if p != "pipeline"], choices=list(PARTS))
    parser.add_argument("--pipeline", type=Path, help="folder of the pipeline, for that part")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/people.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    if "pipeline" in options.parts and options.pipeline is None:
        parser.error("the part pipeline takes --pipeline FOLDER, one of `benchmarks/shapes.py pretrain`")
    given: Any = None
    for part in options.parts:
        for seed in range(options.seeds):
            if any((line["part"], line["seed"]) == (part, seed) for line in lines):
                continue
            if given is None and part not in ("candidates", "caution", "pipeline"):
                given = pool()
            begin = time.process_time()
            lines.append(
                {"part": part, "seed": seed, **PARTS[part](options.pipeline if part == "pipeline" else given, seed)}
            )
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(f"{part}, seed {seed}: {time.process_time() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
