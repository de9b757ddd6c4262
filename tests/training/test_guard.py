"""The guard: the price of path KL by hand-computed numbers, KL* in closed form, drift, and each sentence on and off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problem import needed
from torch import Tensor

from scoreact.algorithms.registry import rules
from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.control.critic import Critic
from scoreact.control.policy import Policy
from scoreact.control.value import ValueNetwork
from scoreact.control.value_fit import Sample, ValueFit
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.optimum import optimal_kl
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import build, linear_reward, mixture
from scoreact.report import html as report
from scoreact.report.words import what_happened
from scoreact.runs.checkpoint import load_checkpoint
from scoreact.runs.record import read_record
from scoreact.support.files import read_lines
from scoreact.training.config import Config, read, updated, usable
from scoreact.training.guard import Guard
from scoreact.training.kl_price import KLPrice, has_kl_term, reprice, sees_kl
from scoreact.types import Condition, Metrics

# --- the price of path KL ----------------------------------------------------------------------------------------------


def test_the_price_by_hand() -> None:
    price = KLPrice(2.0, integral=0.1, proportional=0.5)
    assert price.factor == 1
    # log(1 / 2) = -0.693: the integral alone at first
    assert price.update(1.0) == pytest.approx(math.exp(-0.0693147), rel=1e-6)
    # log(3 / 2) = 0.405: 0.1 x 0.405 + 0.5 x (0.405 + 0.693)
    assert price.update(3.0) == pytest.approx(math.exp(-0.0693147 + 0.0405465 + 0.5493061), rel=1e-6)
    # far over: clipped at 1; after 7 iterations twice the integral alone
    assert price.update(1e9, 7) == pytest.approx(math.exp(0.5205380 + 0.2), rel=1e-6)
    assert KLPrice(2.0, integral=0.1).update(0.0) == pytest.approx(math.exp(-0.1))  # no KL yet: clipped at -1


def test_the_price_stays_within_its_limit() -> None:
    price = KLPrice(1.0)
    for _ in range(200):
        price.update(1e-9)
    assert price.factor == pytest.approx(1e-3)


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("lag", [1, 2, 5, 10])
@pytest.mark.parametrize("every", [1, 5])
def test_the_price_reaches_the_target_of_a_policy_that_lags(target: float, lag: int, every: int) -> None:
    """A policy that goes 1/lag of the way to its KL of c / price^2 each iteration, looked at every so often."""
    price, kl, path = KLPrice(target), 0.0, []
    for iteration in range(80):
        if iteration % every == 0:
            price.update(kl, every)
        kl += (1.0 / price.factor**2 - kl) / lag
        path.append(kl)
    assert path[-1] == pytest.approx(target, rel=0.05)
    if every == 1 and target >= 1:
        assert max(path) < 1.4 * target


def rule_of(name: str, folder: Path = Path(), **settings: Any) -> Any:
    settings |= needed(name, folder)
    model = ResidualModel(mixture(2, 3, 0), 2, width=8)
    policy, sde = Policy(model), SDE(model.schedule, noise_level(1.0))
    return rules()[name](policy, sde, SOLVERS["ddim"], None, 0.5, linear_reward(2, 0), **settings)


def test_which_rules_pay_for_kl_and_which_see_it(tmp_path: Path) -> None:
    unpaid = {name for name in rules() if not has_kl_term(rule_of(name, tmp_path))}
    assert unpaid == {"ddpo", "dxmi"}
    assert not has_kl_term(rule_of("draft", kl_share=0.0))
    assert not has_kl_term(rule_of("flow_grpo", reference_kl=False))
    seen = {name for name in rules() if sees_kl(rule_of(name, tmp_path))}
    assert {"ctrl", "ctrl_trpo", "ctrl_pathwise", "dpok"} <= seen
    assert seen.isdisjoint({"ddpo", "draft", "diffusion_nft", "rwr", "flow_grpo", "adjoint_matching"})


def test_another_price_is_paid_by_the_remembered_returns() -> None:
    """target = R - beta costs: at another beta, R less the other price of the same costs."""
    rule = rule_of("ctrl")
    network = ValueNetwork(VectorValue(4, 8), rule.sde, rule.policy, "both", log_sigmoid=0.5)
    fit = ValueFit(network, 0.5, "soft")
    rule.critic = critic = Critic(fit, rule.policy, rule.sde, rule.solver)
    rewards, costs = torch.tensor([1.0, 2.0]), torch.tensor([0.3, 0.7])  # costs in nats
    condition = Condition(["", ""])
    fit.memory = [
        Sample(torch.zeros(2), torch.zeros(2, 4), rewards - 0.5 * costs, condition, 0.5 * costs),
        Sample(torch.zeros(2), torch.zeros(2, 4), rewards, condition),  # the reference's
    ]
    reprice(2.0, rule)
    assert rule.kl_weight == critic.kl_weight == fit.kl_weight == network.log_sigmoid == 2.0
    assert torch.allclose(fit.memory[0].target, rewards - 2 * costs)
    assert fit.memory[0].later_costs is not None
    assert torch.allclose(fit.memory[0].later_costs, 2 * costs)
    assert torch.equal(fit.memory[1].target, rewards)


# --- what the optimum spends -------------------------------------------------------------------------------------------


def test_kl_of_the_optimum_in_closed_form(generator: torch.Generator) -> None:
    """R = s x with x normal: KL* = (s / beta)^2 / 2, for two prompts with their own s; its error is the spread of it."""
    found, count = [], 4000
    condition = Condition(["a", "b"] * (count // 2))
    scale = torch.tensor([0.3, 0.6]).repeat(count // 2)
    for _ in range(100):
        rewards = scale * torch.randn(count, generator=generator)
        found.append(optimal_kl(rewards, condition, 0.5))
    kls = torch.tensor([m["objective/KL_star"] for m in found])
    errors = torch.tensor([m["objective/KL_star_se"] for m in found])
    exact = (0.6**2 / 2 + 1.2**2 / 2) / 2
    assert abs(float(kls.mean()) - exact) < 0.02
    assert float(errors.mean()) == pytest.approx(float(kls.std()), rel=0.25)


def test_the_exact_kl_of_the_optimum_is_a_derivative() -> None:
    """The trainer's -dJ* / dbeta against E* R by samples of the tilted law: (E* R - J*) / beta."""
    problem = build(width=8)
    result = train(problem=problem, iterations=1)
    base: Any = problem.model.base  # type: ignore[attr-defined]
    reward: Any = problem.reward
    tilted, j_star = base.tilted(reward.linear, reward.quadratic, 0.5)
    x = tilted.sample(400_000, torch.Generator().manual_seed(0))
    exact = (float(reward(x, Condition([""])).mean()) - j_star) / 0.5
    assert result.reference["objective/KL_star_exact"] == pytest.approx(exact, abs=0.01)


# --- samples -----------------------------------------------------------------------------------------------------------


def test_drift_is_the_frechet_distance_to_the_reference(generator: torch.Generator) -> None:
    guard = Guard(1.0)
    reference, other = torch.randn(2, 300, 3, generator=generator)
    condition = Condition([""] * 300)
    guard.remember(lambda x: x, other[:200], 250)
    guard.remember(lambda x: x, other[200:], 250)
    guard.remember(lambda x: pytest.fail("enough samples"), other, 250)
    first = guard.look_at_samples(reference, condition, True)
    assert first["drift/frechet"] == pytest.approx(0.0, abs=1e-9)
    assert 0.001 < first["drift/frechet_floor"] < 0.2
    shifted = guard.look_at_samples(reference + torch.tensor([3.0, 0.0, 4.0]), condition, False)
    assert shifted["drift/frechet"] == pytest.approx(25.0, rel=1e-6)
    assert shifted["drift/frechet_floor"] == first["drift/frechet_floor"]
    wide = Guard(1.0).look_at_samples(torch.randn(20, 1, 9, 9, generator=generator), condition, True)
    assert wide == {}  # 81 numbers and no features: no space to measure in
    featured = Guard(1.0, features=lambda x: x.flatten(1)[:, :2])
    featured.look_at_samples(torch.ones(20, 1, 9, 9), condition, True)
    assert featured.look_at_samples(torch.zeros(20, 1, 9, 9), condition, False)["drift/frechet"] == pytest.approx(2.0)


def test_the_judges_noise_is_that_of_its_mean(generator: torch.Generator) -> None:
    """For a mean the jackknife over five parts is the standard error of five means."""
    x = torch.rand(500, 1, generator=generator)
    guard = Guard(1.0, judge=lambda s, c: {"judge/error": float(s.double().mean()), "judge/other": 1.0})
    guard.look_at_samples(x, Condition([""] * 500), True)
    parts = torch.stack([x[i::5].double().mean() for i in range(5)])
    assert guard.judge_noise == {"judge/error": pytest.approx(float(parts.std() / 5**0.5))}
    sure = Guard(1.0, judge=lambda s, c: {"judge/class_error": 0.0})
    sure.look_at_samples(x, Condition([""] * 500), True)
    assert sure.judge_noise == {"judge/class_error": 1 / 500}


def test_the_noise_of_a_change_leaves_out_what_both_looks_share(generator: torch.Generator) -> None:
    """Samples that differ by 1, and a shift of all by 0.1: the mean's own error is 0.045, the change's is none."""
    x, condition = torch.randn(500, 1, generator=generator), Condition([""] * 500)
    guard = Guard(1.0, judge=lambda s, c: {"judge/error": float(s.double().mean())})
    guard.start = guard.look_at_samples(x, condition, True)
    assert guard.judge_noise["judge/error"] > 0.01
    now = guard.look_at_samples(x + 0.1, condition, False)
    assert guard.judge_noise == {"judge/error": 1 / 500}
    assert guard._worsened(now, "judge/error") is not None
    unlike = guard.look_at_samples(torch.randn(500, 1, generator=generator), condition, False)
    assert guard.judge_noise["judge/error"] > 0.01
    assert guard._worsened(unlike, "judge/error") is None


# --- sentences ---------------------------------------------------------------------------------------------------------

START: Metrics = {
    "reward/heldout": 0.0, "objective/J": 0.0, "objective/J_se": 0.02, "policy/kl": 0.0, "policy/kl_se": 0.0,
    "sample/diversity": 2.0, "judge/class_error": 0.10, "judge/property": 0.30,
}  # fmt: skip
REFERENCE: Metrics = {"objective/trusted": 1.0, "objective/KL_star": 2.0, "objective/KL_star_se": 0.1}


def guard_of(mode: str = "warn", **settings: Any) -> Guard:
    return Guard(
        0.5, mode, start=START, judge_noise={"judge/class_error": 0.0141, "judge/property": 0.0283}, **settings
    )


def evaluation(reward: float, kl: float, **more: float) -> Metrics:
    found = {**START, "reward/heldout": reward, "policy/kl": kl, "policy/kl_se": 0.02, "objective/J": reward - 0.5 * kl}
    return {**found, **{name.replace("__", "/"): value for name, value in more.items()}}


CASES: list[tuple[str, Metrics, Metrics, str]] = [
    # KL* 2, slack 1.5: 3, and three times the errors' root 0.1^2 + 0.02^2: 3.306
    ("kl", evaluation(4.0, 3.31), evaluation(4.0, 3.30), "path KL is 3.31 nats, but the optimum at kl_weight 0.5 needs 2:"),
    # a reward of 0.5 pays for 1 nat; errors of J 3 x 0.0283 = 0.085 are 0.17 nats
    ("kl", evaluation(0.5, 1.18), evaluation(0.5, 1.16), "the reward gained (0.5) pays for 1 at kl_weight 0.5"),
    ("diversity", evaluation(1.0, 1.0, sample__diversity=0.99), evaluation(1.0, 1.0, sample__diversity=1.01),
     "diversity fell to 0.99, 50% of the pretrained model's 2"),
    # 3 x 0.0141 = 0.0423
    ("judge/class_error", evaluation(1.0, 1.0, judge__class_error=0.143), evaluation(1.0, 1.0, judge__class_error=0.142),
     "judge/class_error worsened from 0.1 to 0.143, beyond its noise (0.042)"),
    ("judge/property", evaluation(1.0, 1.0, judge__property=0.21), evaluation(1.0, 1.0, judge__property=0.22),
     "judge/property worsened from 0.3 to 0.21"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "bad", "fine", "text"), CASES)
def test_each_sentence_and_the_limit_where_it_begins(kind: str, bad: Metrics, fine: Metrics, text: str) -> None:
    assert guard_of().look(fine, START, REFERENCE, False)[0] == []
    guard = guard_of()
    new, stop, best = guard.look(bad, START, REFERENCE, False)
    assert [finding.kind for finding in new] == [kind]
    assert text in new[0].text
    assert new[0].text.count(".") >= 2
    assert stop is None
    assert best  # nothing else is there yet
    assert guard.look(bad, bad, REFERENCE, False)[0] == []  # said once
    guard.look(fine, bad, REFERENCE, False)
    assert len(guard.look(bad, fine, REFERENCE, False)[0]) == 1  # and again after it had gone
    found, stopped, _ = guard_of("stop").look(bad, START, REFERENCE, False)
    assert stopped is not None
    assert found[0].text in stopped
    assert guard_of("stop").look(fine, START, REFERENCE, False)[1] is None
    assert guard_of("off").look(bad, START, REFERENCE, False)[:2] == ([], None)


def test_an_estimate_not_to_be_trusted_accuses_nobody() -> None:
    bad = evaluation(4.0, 3.31)
    assert guard_of().look(bad, START, {**REFERENCE, "objective/trusted": 0.0}, False)[0] == []
    exact = {"objective/trusted": 0.0, "objective/KL_star_exact": 2.0}
    assert guard_of().look(bad, START, exact, False)[0][0].limit == 2.0


def test_off_may_be_written_bare_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("guard: off\ntarget_kl: 2\n")
    config = updated(Config(), read(tmp_path / "a.yaml"))
    assert (config.guard, config.target_kl) == ("off", 2.0)
    with pytest.raises(ValueError, match="guard is True; known: off, warn, stop"):
        Config(guard=True)  # type: ignore[arg-type]


def test_a_metric_of_unknown_direction_is_not_watched() -> None:
    guard = guard_of()
    guard.start = {**START, "judge/mean": 1.0, "judge/mean_se": 0.1, "judge/frechet": 8.0, "judge/frechet_se": 1.0}
    bad = evaluation(1.0, 1.0, judge__mean=9.0, judge__frechet=12.0, judge__frechet_se=0.5)
    assert (
        guard.look(bad, START, REFERENCE, False)[0][0].kind == "judge/frechet"
    )  # 4 > 3 sqrt(1 + 0.25), by its own errors
    assert guard.look({**bad, "judge/frechet": 11.0}, START, REFERENCE, False)[0] == []
    assert guard.look({**bad, "judge/frechet": 11.0, "judge/mean": -9.0}, START, REFERENCE, False)[0] == []


def test_a_reward_that_rises_less_than_its_uncertainty() -> None:
    def one(reward: float, sigma: float) -> Metrics:
        return evaluation(reward, 0.1, reward__cautious=reward - sigma)

    first, risen, doubtful = one(1.0, 0.5), one(2.0, 1.51), one(2.0, 1.55)  # J's error is 0.02
    assert guard_of().look(risen, first, REFERENCE, False)[0] == []
    guard = guard_of()
    (found,), stop, _ = guard.look(doubtful, first, REFERENCE, False)
    assert (found.kind, found.limit, stop) == ("uncertainty", 0.5, None)
    assert "rose to 2, but less one sigma of what the answers leave open it fell from 0.5 to 0.45" in found.text
    assert not guard.best_is_clean
    assert guard_of("stop").look(doubtful, first, REFERENCE, False)[1] is not None
    assert guard_of("off").look(doubtful, first, REFERENCE, False)[0] == []
    assert guard_of().look(one(0.9, 0.9), first, REFERENCE, False)[0] == []  # a reward that falls deceives nobody


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_falling_j_while_the_reward_rises(mode: str) -> None:
    guard = guard_of(mode, patience=2)
    one, two, three = evaluation(2.0, 1.0), evaluation(1.9, 1.1), evaluation(1.8, 1.2)
    guard.look(one, START, REFERENCE, True)
    new, stop, best = guard.look(two, one, REFERENCE, True)
    assert [f.kind for f in new] == ([] if mode == "off" else ["objective"])
    assert stop is None
    assert not best
    stop = guard.look(three, two, REFERENCE, True)[1]
    assert (stop is None) == (mode == "off")
    assert mode == "off" or "held-out J fell 2 evaluations in a row" in str(stop)
    calm = guard_of(mode, patience=1)
    assert calm.look(two, one, REFERENCE, False)[:2] == ([], None)  # the training reward did not rise
    assert calm.look({**two, "objective/J": 1.47}, one, REFERENCE, True)[:2] == ([], None)  # within 2 x 0.02


def test_best_weights_are_those_without_a_finding() -> None:
    fine, higher = evaluation(1.0, 1.0), evaluation(3.0, 1.0, sample__diversity=0.5)
    guard = guard_of()
    assert guard.look(higher, START, REFERENCE, False)[2]
    assert guard.look(fine, higher, REFERENCE, False)[2]  # a lower J, but clean
    assert not guard.look(higher, fine, REFERENCE, False)[2]
    assert guard.look(evaluation(1.2, 1.0), higher, REFERENCE, False)[2]
    off = guard_of("off")
    assert off.look(fine, START, REFERENCE, False)[2]
    assert off.look(higher, fine, REFERENCE, False)[2]


def test_with_a_target_its_nats_are_free() -> None:
    guard = guard_of(target_kl=6.0)
    assert guard.score(evaluation(2.0, 5.0)) == 2.0
    assert guard.score(evaluation(2.0, 8.0)) == pytest.approx(1.0)  # two nats over, 0.5 each
    assert guard.look(evaluation(1.0, 8.9), START, REFERENCE, False)[0] == []  # J is far below J_ref: as wished
    assert [f.kind for f in guard.look(evaluation(9.0, 9.1), START, REFERENCE, False)[0]] == ["kl"]


# --- in a run ----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "iterations": 6, "batch_size": 32, "steps": 4, "solver": "euler_maruyama", "kl_weight": 0.5, "value_steps": 3,
    "value_first_steps": 5, "value_batch_size": 32, "reference_batches": 2, "heldout_samples": 40, "minibatch_size": 64,
    "evaluate_every": 2, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


def train(out: Path | None = None, problem: Any = None, seed_of_model: int = 0, **settings: Any) -> Result:
    run = {k: settings.pop(k) for k in ("resume", "on_event", "judge") if k in settings}
    with torch.random.fork_rng():
        torch.manual_seed(seed_of_model)
        problem = problem or build(width=8)
    return finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, out=out,
        optimum=problem.optimum, **run, **usable(Config(), {**SMALL, **settings}),
    )  # fmt: skip


def weights(result: Result) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.policy.model.parameters()])  # type: ignore[attr-defined]


def lines(folder: Path) -> list[dict[str, Any]]:
    kept = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in kept]


def judge_of_the_mean() -> Any:
    """The larger the samples' mean, the worse: 100 times the distance from the first samples' mean."""
    first: list[Tensor] = []

    def judge(samples: Tensor, condition: Condition) -> Metrics:
        if not first:
            first.append(samples.mean(0))
        return {"judge/quality": -1000.0 * float((samples.mean(0) - first[0]).norm()) if len(samples) == 40 else 0.0}

    return judge


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_a_finding_is_told_everywhere(tmp_path: Path, mode: str) -> None:
    events: list[tuple[str, Metrics]] = []
    result = train(
        tmp_path / "run",
        guard=mode,
        judge=judge_of_the_mean(),
        on_event=lambda *e: events.append(e),
        learning_rate=0.02,
    )
    said = [line for line in lines(tmp_path / "run") if line.get("guard")]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    happened = what_happened(read_record(tmp_path / "run"))
    assert len(read_record(tmp_path / "run").iterations) == max(line["iteration"] for line in lines(tmp_path / "run"))
    if mode == "off":
        assert said == stored["guard"] == [m for k, m in events if k == "guard"] == []
        assert happened[0] == "The guard was off."
        return
    assert said[0]["guard"] == "judge/quality"
    assert "judge/quality worsened from -0 to" in said[0]["text"]
    assert stored["guard"] == said == [m for kind, m in events if kind == "guard"]
    assert happened[0] == f"Iteration 2: {said[0]['text']}"
    assert any("Frechet distance of the samples" in text for text in happened)
    if mode == "stop":
        page = report.write(tmp_path / "run", build(width=8)).read_text()
        assert page.count("What happened") == 1
        assert "judge/quality worsened" in page
        assert result.stopped is not None
        assert said[0]["text"] in result.stopped
        assert max(line["iteration"] for line in lines(tmp_path / "run")) == 2
    else:
        assert result.stopped is None


def test_a_calm_run_says_so(tmp_path: Path) -> None:
    train(tmp_path / "run", learning_rate=1e-6)
    happened = what_happened(read_record(tmp_path / "run"))
    said = json.loads((tmp_path / "run" / "result.json").read_text())["guard"]
    assert {line["guard"] for line in said} == {"unmoved"}  # it is
    assert happened[len(said)].startswith("The guard found nothing wrong")
    last = [line for line in lines(tmp_path / "run") if line.get("evaluation")][-1]
    assert last["drift/frechet"] < last["drift/frechet_floor"]


@pytest.mark.parametrize(
    "rule",
    [
        {"algorithm": "ctrl"},
        {"algorithm": "ctrl_pathwise", "value_loss": "soft", "value_replay": 3, "reuse_reference": 2},
        {"algorithm": "ctrl_trpo"},
        {"algorithm": "draft"},
    ],
)
def test_an_interrupted_run_with_a_target_goes_on_as_if_it_were_none(tmp_path: Path, rule: dict[str, Any]) -> None:
    given = {**rule, "target_kl": 0.2, "judge": judge_of_the_mean(), "learning_rate": 0.02, "iterations": 7}
    whole = train(tmp_path / "whole", **given)

    class Killed(BaseException):
        pass

    def die(kind: str, metrics: Metrics) -> None:
        if kind == "iteration" and metrics["iteration"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "cut", **{**given, "judge": judge_of_the_mean()}, on_event=die)
    assert load_checkpoint(tmp_path / "cut" / "checkpoints")[0] == 4
    resumed = train(tmp_path / "cut", seed_of_model=9, resume=True, **given)
    assert torch.equal(weights(whole), weights(resumed))
    one, other = ([line for line in lines(tmp_path / run) if line.get("guard") != "note"] for run in ("whole", "cut"))
    assert one == other
    prices = [line["policy/kl_weight"] for line in lines(tmp_path / "whole") if "policy/kl_weight" in line]
    assert len(set(prices)) > 2
    said = [text for text in what_happened(read_record(tmp_path / "cut")) if "reference.safetensors" not in text]
    assert what_happened(read_record(tmp_path / "whole")) == said
    for folder in ("", "best"):
        assert len({(tmp_path / run / folder / "model.safetensors").read_bytes() for run in ("whole", "cut")}) == 1


def test_a_rule_without_a_kl_term_says_so(tmp_path: Path) -> None:
    train(tmp_path / "run", algorithm="ddpo", target_kl=0.5, iterations=2)
    said = [line["text"] for line in lines(tmp_path / "run") if line.get("guard") == "target_kl"]
    assert [text.startswith("target_kl is 0.5, but ddpo with these settings has no KL term") for text in said] == [True]
    train(tmp_path / "other", algorithm="draft", target_kl=0.5, iterations=2)
    assert not any(line.get("guard") == "target_kl" for line in lines(tmp_path / "other"))


def test_the_references_own_paths_do_not_move_the_price(tmp_path: Path) -> None:
    """Reused paths of the reference have KL 0 whatever the policy has become."""
    train(tmp_path / "run", algorithm="ctrl_pathwise", reuse_reference=2, target_kl=0.5, iterations=3)
    prices = [line["policy/kl_weight"] for line in lines(tmp_path / "run") if "policy/kl_weight" in line]
    assert prices[:2] == [0.5, 0.5]
    assert prices[2] != 0.5


@pytest.mark.parametrize("target", [pytest.param(0.15, marks=pytest.mark.slow), 1.2])
def test_a_run_reaches_its_target(target: float) -> None:
    """The optimum at kl_weight 0.5 spends about 0.45 nats; a third of it, and three times as much."""
    result = train(
        target_kl=target, steps=10, batch_size=128, iterations=40, minibatch_size=1024, evaluate_every=100,
        heldout_samples=1000, value_steps=10, value_first_steps=60, value_batch_size=256,
    )  # fmt: skip
    assert result.final["policy/kl"] == pytest.approx(target, rel=0.3)
    # J keeps the original price
    assert result.final["objective/J"] == pytest.approx(
        result.final["reward/heldout"] - 0.5 * result.final["policy/kl"], abs=1e-5
    )
