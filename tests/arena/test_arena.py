"""The arena: budgets kept to the last call, results resumed, statistics against sums by hand, tables, plots, tuning."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scoreact.arena import bench as arena
from scoreact.arena import referee, tuning
from scoreact.arena import run as arena_run
from scoreact.arena import tables as arena_tables
from scoreact.arena.bench import bench
from scoreact.arena.budget import check_budget, spent
from scoreact.arena.problems import HELDOUT, PROBLEMS, TUNING_SEEDS, ArenaProblem, Job, check_used, own_problem, skips
from scoreact.arena.referee import measure, transfer
from scoreact.arena.run import run_one
from scoreact.arena.tuning import search_space, tune
from scoreact.cli import main as cli
from scoreact.control.policy import Policy
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.rewards import Quadratic, is_differentiable
from scoreact.sampling.draw import draw
from scoreact.support.files import resume_lines
from scoreact.training import reference_look
from scoreact.training import trainer as trainer_module
from scoreact.training.trainer import Trainer
from scoreact.types import Condition

SMALL = {
    "batch_size": 16, "steps": 4, "heldout_samples": 64, "reference_batches": 2, "value_steps": 2, "value_first_steps": 3,
    "value_batch_size": 32, "minibatch_size": 32,
}  # fmt: skip
TINY = ArenaProblem("tiny", "gaussian", 20_000, 400, True, {"width": 8}, settings=SMALL, reference_samples=200)


def job(rule: str = "ctrl", seed: int = 0, network_calls: int = 8_000, reward_calls: int = 400, **changes: Any) -> Job:
    yardstick = measure(TINY, {}, 0, HELDOUT["bench"])
    changes = {"transfer_samples": 0, **changes}
    return Job(rule, TINY, seed, 0.5, network_calls, reward_calls, yardstick=yardstick, **changes)


def small_bench(out: Path, rules: list[str] | None = None, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "seeds": 2,
        "network_calls": 3_000,
        "reward_calls": 120,
        "points": 3,
        "transfer_samples": 8,
    }
    return bench(rules or ["ctrl", "ctrl_pathwise"], [TINY], out=out, **{**settings, **changes})


# --- budgets ---------------------------------------------------------------------------------------------------------


class Counter:
    """Samples through score networks and value networks, and through the reward, by someone else's count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.network = self.reward = 0
        self.after: list[tuple[int, int]] = []  # each iteration
        for kind, method, column in (
            (ResidualModel, "score", "network"), (VectorValue, "forward", "network"), (Quadratic, "__call__", "reward"),
        ):  # fmt: skip
            monkeypatch.setattr(kind, method, self._counted(getattr(kind, method), column))
        for name in ("heldout", "transfer"):
            monkeypatch.setattr(arena_run, name, self._uncounted(getattr(arena_run, name)))
        # looks for what would keep a run from learning, which are no cost of learning
        monkeypatch.setattr(trainer_module, "check_weights", self._uncounted(trainer_module.check_weights))
        monkeypatch.setattr(reference_look, "_is_of_a_sample", self._uncounted(reference_look._is_of_a_sample))
        iterate = Trainer.iterate

        def watched(trainer: Trainer) -> Any:
            metrics = iterate(trainer)
            self.after.append((self.network, self.reward))
            return metrics

        monkeypatch.setattr(Trainer, "iterate", watched)

    def _counted(self, function: Callable[..., Any], column: str) -> Callable[..., Any]:
        def wrapper(owner: Any, first: Any, *rest: Any) -> Any:
            setattr(self, column, getattr(self, column) + len(first))
            return function(owner, first, *rest)

        return wrapper

    def _uncounted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            before = self.network, self.reward
            found = function(*arguments, **named)
            self.network, self.reward = before
            return found

        return wrapper


@pytest.mark.parametrize(
    ("rule", "network", "reward"),
    [("ctrl", 4_000, 10_000), ("ctrl_pathwise", 10_000_000, 100), ("ctrl_trpo", 6_000, 999)],
)
def test_no_run_exceeds_a_budget_and_the_calls_are_those_of_an_independent_count(
    rule: str, network: int, reward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(rule, network_calls=network, reward_calls=reward)
    counter = Counter(monkeypatch)
    line = run_one(wanted)
    assert line["iterations"] >= 2
    assert (line["network_calls"], line["reward_calls"]) == counter.after[line["iterations"] - 1]
    for point in line["curve"]:
        assert point["network_calls"] <= network
        assert point["reward_calls"] <= reward
    costs = [
        (b[0] - a[0], b[1] - a[1]) for a, b in zip(counter.after, counter.after[1:], strict=False)
    ]  # of the second iteration on
    least = [min(column) for column in zip(*costs, strict=True)]
    left = network - line["network_calls"], reward - line["reward_calls"]
    taken_back = len(counter.after) > line["iterations"]
    assert taken_back or any(space < cost for space, cost in zip(left, least, strict=True))  # it did not stop early


def test_a_budget_of_just_what_was_used_is_used_again_and_one_call_less_is_an_iteration_less() -> None:
    first = run_one(job(network_calls=4_000))
    used = first["network_calls"]
    assert used < 4_000
    same, less = (run_one(job(network_calls=n)) for n in (used, used - 1))
    assert (same["iterations"], same["network_calls"]) == (first["iterations"], used)
    assert less["iterations"] == first["iterations"] - 1
    assert less["network_calls"] < used


def test_an_iteration_taken_back_leaves_the_weights_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The final evaluation is of the average before the iteration that went over."""
    seen: list[torch.Tensor] = []
    averages: list[torch.Tensor] = []
    heldout, iterate = arena_run.heldout, Trainer.iterate

    def weights(model: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    def looking(policy: Any, *rest: Any, **named: Any) -> Any:
        seen.append(weights(policy.model))
        return heldout(policy, *rest, **named)

    def watched(trainer: Trainer) -> Any:
        metrics = iterate(trainer)
        averages.append(weights(trainer.average.model))
        if trainer.iteration == 3:
            trainer.policy.network_calls += 8_001 - spent(trainer)[0]  # one over, which nobody could foresee
        return metrics

    wanted = job()
    monkeypatch.setattr(arena_run, "heldout", looking)
    monkeypatch.setattr(Trainer, "iterate", watched)
    line = run_one(wanted)
    assert (line["iterations"], len(averages)) == (2, 3)
    assert line["network_calls"] < 8_000
    assert line["reward_calls"] == 16 * (2 + 2)
    assert torch.equal(seen[-1], averages[1])
    assert not torch.equal(seen[-1], averages[2])


def test_the_curve_starts_at_nothing_and_a_critics_first_paths_are_spent_before_it_moves() -> None:
    critic = run_one(job("ctrl"))["curve"]
    assert (critic[0]["network_calls"], critic[0]["reward_calls"], critic[0]["recovered"]) == (0, 0, 0.0)
    assert (critic[1]["reward_calls"], critic[1]["recovered"]) == (2 * 16, 0.0)
    assert critic[1]["network_calls"] == 2 * 16 * 4 + 1  # whether the value network takes its inputs was tried once
    for column in ("network_calls", "reward_calls", "seconds", "iteration"):
        values = [point[column] for point in critic]
        assert values == sorted(values)


def test_the_learning_rate_falls_to_the_runs_end_whatever_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    iterate = Trainer.iterate

    def watched(trainer: Trainer) -> Any:
        rates.append(trainer.rate())
        return iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", watched)
    line = run_one(job("ctrl_pathwise", network_calls=10_000_000, reward_calls=16 * (2 + 12)))
    assert line["iterations"] == 12
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert rates[-3:] == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_a_budget_too_small_for_one_iteration_is_said_beforehand_or_by_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"40 reward calls are too few for one iteration of ctrl on tiny, .* 48; raise"
    ):
        small_bench(tmp_path / "a", reward_calls=40)
    with pytest.raises(ValueError, match=r"100 network calls are too few .* raise network_calls"):
        small_bench(tmp_path / "a", network_calls=100)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"ctrl on tiny needs \d+ network calls and 48 reward calls for its first"):
        run_one(job(network_calls=200))


def test_a_rules_settings_do_not_touch_the_referee() -> None:
    one = job(common={"steps": 6}, settings={"noise_scale": 0.5, "steps": 3, "ratio_weight": 0.2})
    assert (one.config().steps, one.config().noise_scale, one.config().rule["ratio_weight"]) == (3, 0.5, 0.2)
    referee = TINY.config(one.common)
    assert (referee.steps, referee.noise_scale) == (6, 1.0)


def test_a_run_that_diverges_counts_with_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def failing(trainer: Trainer) -> Any:
        if trainer.iteration == 2:
            trainer.policy.network_calls += 10**9
            raise RuntimeError("the loss is nan")
        return iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", failing)
    line = run_one(job())
    assert line["stopped"] == "diverged at iteration 3: the loss is nan"
    assert line["iterations"] == 2
    assert line["network_calls"] < 8_000
    assert math.isfinite(line["recovered"])


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second each."""
    monkeypatch.setattr(arena_tables, "plots", lambda *arguments: [])


# --- results, resumed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two rules at two prices of KL."""
    out = tmp_path_factory.mktemp("arena") / "out"
    small_bench(out, kl_weights=[0.5, 1.0])
    return out


def copied(results: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    for path in results.rglob("*"):
        if path.is_file():
            (out / path.relative_to(results)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(results)).write_bytes(path.read_bytes())
    return out


@pytest.mark.usefixtures("no_plots")
def test_a_second_call_runs_nothing_and_a_torn_line_is_run_again(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(results, tmp_path)
    ran: list[tuple[str, int, float]] = []
    run_one = arena_run.run_one

    def watched(one: Job) -> Any:
        ran.append((one.rule, one.seed, one.kl_weight))
        return run_one(one)

    monkeypatch.setattr(arena, "run_one", watched)
    before = (out / "results.jsonl").read_text()
    assert len(small_bench(out, kl_weights=[0.5, 1.0])) == 8
    assert ran == []
    assert (out / "results.jsonl").read_text() == before
    whole = before.splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(whole[:-1]) + whole[-1][:100])
    small_bench(out, kl_weights=[0.5, 1.0])
    last = json.loads(whole[-1])
    assert ran == [(last["rule"], last["seed"], last["kl_weight"])]
    again = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert again[:-1] == [json.loads(text) for text in whole[:-1]]
    assert again[-1]["recovered"] == last["recovered"]  # the same seed, the same run


@pytest.mark.usefixtures("no_plots")
def test_more_seeds_run_only_what_is_new_and_another_budget_needs_another_folder(results: Path, tmp_path: Path) -> None:
    out = copied(results, tmp_path)
    small_bench(out, ["ctrl"], seeds=3)
    lines = resume_lines(out / "results.jsonl")
    assert [(x["rule"], x["seed"]) for x in lines[8:]] == [("ctrl", 2)]
    with pytest.raises(ValueError, match=r"other settings: network_calls 3000 -> 4000\. Repeat with the same, or give"):
        small_bench(out, network_calls=4_000)


@pytest.mark.usefixtures("no_plots")
def test_a_damaged_line_in_the_middle_is_named(results: Path, tmp_path: Path) -> None:
    out = copied(results, tmp_path)
    texts = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(texts[0] + "{torn\n" + "".join(texts[1:]))
    with pytest.raises(ValueError, match=r"line 2 of .*results\.jsonl is damaged; delete that line"):
        small_bench(out, kl_weights=[0.5, 1.0])


@pytest.mark.usefixtures("no_plots")
def test_a_crash_is_recorded_and_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one = arena_run.run_one
    crash = True

    def failing(one: Job) -> Any:
        if crash and one.seed == 0:
            raise RuntimeError("no luck\ntoday")
        return run_one(one)

    monkeypatch.setattr(arena, "run_one", failing)
    lines = small_bench(tmp_path, ["ctrl"], seeds=3)
    assert [line.get("failed") for line in lines] == ["RuntimeError: no luck today", None, None]
    text = (tmp_path / "table.md").read_text()
    assert "- ctrl: 1 failed, the first: RuntimeError: no luck today" in text
    [entry] = json.loads((tmp_path / "summary.json").read_text())[0]["rules"]
    assert entry["runs"] == 2
    crash = False
    assert "failed" in small_bench(tmp_path, ["ctrl"], seeds=3)[0]  # what failed is not tried again by itself
    assert not any("failed" in line for line in small_bench(tmp_path, ["ctrl"], seeds=3, retry=True))
    assert "failed" not in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("no_plots")
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one = arena_run.run_one

    def interrupted(one: Job) -> Any:
        if one.seed == 1:
            raise KeyboardInterrupt
        return run_one(one)

    monkeypatch.setattr(arena, "run_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_bench(tmp_path, ["ctrl"])
    assert [line["seed"] for line in resume_lines(tmp_path / "results.jsonl")] == [0]


# --- what a run says -------------------------------------------------------------------------------------------------


def test_lines_hold_what_the_tables_need(results: Path) -> None:
    lines = resume_lines(results / "results.jsonl")
    assert len(lines) == 8
    for line in lines:
        assert line["curve"][-1]["recovered"] == line["recovered"]
        reference = line["yardstick"]
        gap = reference["objective/J_star_exact"] - reference["objective/J_ref"]
        share = (line["J"] - reference["start"]["objective/J"]) / gap
        assert line["recovered"] == pytest.approx(share)
        assert line["J"] == pytest.approx(line["reward"] - line["kl_weight"] * line["kl"], abs=1e-5)
        assert line["config"]["seed"] == line["seed"]
        assert 3 <= len(line["curve"]) <= 6
    by_rule = {(x["rule"], x["kl_weight"], x["seed"]): x["J"] for x in lines}
    assert len(set(by_rule.values())) == 8


def test_transfer_is_the_reward_of_the_trained_policy_by_other_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (("ddim", 3), ("ode", 2))
    monkeypatch.setattr(referee, "TRANSFER", rows)
    line = run_one(job(transfer_samples=50))
    problem = TINY.build(0)
    policy = Policy(problem.model)
    untrained = transfer(policy, problem, TINY.config({}), 50, HELDOUT["bench"])
    assert list(line["transfer"]) == list(untrained) == ["ddim 3", "ode 2"]
    for solver, steps in rows:
        ts = uniform(problem.model.schedule, steps)
        x = draw(problem.model, [""] * 50, sampler_by_name(solver), ts, HELDOUT["bench"])[1]
        mean = float(problem.reward(x, Condition([""] * 50)).mean())
        assert untrained[f"{solver} {steps}"] == pytest.approx(mean)
        assert line["transfer"][f"{solver} {steps}"] != pytest.approx(mean, abs=1e-4)


def test_every_problem_can_be_set_up_and_knows_whether_its_reward_has_a_gradient() -> None:
    assert set(PROBLEMS) == {
        "gaussian-2d", "gaussian-16d", "fashion-plain", "fashion-classifier", "fashion-jpeg", "series",
    }  # fmt: skip
    for problem in PROBLEMS.values():
        built = problem.build(0)
        assert is_differentiable(built.reward) == problem.differentiable, problem.name
        config = problem.config({})
        assert config.device == "cpu"
        assert (built.optimum is not None) == (problem.recipe in ("gaussian", "series"))
        for rule in ("ctrl", "ctrl_pathwise", "ctrl_trpo"):
            one = Job(rule, problem, 0, config.kl_weight, problem.network_calls, problem.reward_calls)
            check_budget(one)
    sixteen = PROBLEMS["gaussian-16d"].build(0)
    assert sixteen.model.prior(Condition([""] * 3), torch.Generator().manual_seed(0)).shape == (3, 16)


@pytest.mark.slow
def test_the_series_is_learned() -> None:
    problem = PROBLEMS["series"]
    yardstick = measure(problem, {}, 0, HELDOUT["bench"])
    one = Job("ctrl", problem, 0, 0.3, 500_000, 12_000, transfer_samples=0, yardstick=yardstick)
    assert run_one(one)["recovered"] > 0.4


def test_the_weights_of_a_problem_come_from_the_seed_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (
        torch.cat([p.flatten() for p in TINY.build(seed).model.parameters()])  # type: ignore[attr-defined]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_files_and_pictures(results: Path) -> None:
    text = (results / "table.md").read_text()
    assert text.count("### tiny, kl_weight") == 2
    assert "in closed form, of which no policy on this grid recovers more than" in text
    assert {path.name for path in (results / "plots").iterdir()} == {"tiny.0.5.png", "tiny.1.png", "tiny.frontier.png"}
    for path in (results / "plots").iterdir():
        with Image.open(path) as picture:
            width, height = picture.size
            assert width > 800
            assert height > 500
            colours = picture.convert("RGB").getcolors(1_000_000)
            assert colours is not None
            assert len(colours) > 20
    assert [place["kl_weight"] for place in json.loads((results / "summary.json").read_text())] == [0.5, 1.0]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rules", "ctlr"], r"'ctlr'; known: .* Did you mean 'ctrl'\?"),
        (
            ["--problems", "gausian-2d"],
            r"unknown problem 'gausian-2d'; known: gaussian-2d, .* Did you mean 'gaussian-2d'\?",
        ),
        (["--seeds", "0"], r"--seeds: expected a whole number of at least 1, got '0'"),
        (["--kl-weights", "0"], r"--kl-weights: expected a number above 0, got '0'"),
        (
            ["--rules", "ctrl", "--reward-calls", "9"],
            r"9 reward calls are too few for one iteration of ctrl on gaussian-2d",
        ),
        (["--rules", "ctrl", "--set", "seed=3"], r"seed cannot be a setting here"),
        (["--rules", "ctrl", "--set", "ctl.trace=3"], r"unknown rule 'ctl'; known: ctrl\. Did you mean 'ctrl'\?"),
        (["--rules", "ctrl", "--set", "trase=3"], r"unknown key 'trase'; did you mean 'trace'\?"),
        (["--rules", "ctrl", "--tuned", "nowhere"], r"the folder 'nowhere' of tuned settings does not exist"),
        (
            ["--problems", "gaussian-2d", "--prompts", "p.txt"],
            r"--prompts says something of a problem of your own, and gauss",
        ),
        (
            ["--problems", "plain", "--reward", "brightness"],
            r"unknown problem 'plain'|says something of a problem of your own",
        ),
        (["--table"], r"holds no results\.jsonl; run `scoreact bench"),
    ],
)
def test_words_that_cannot_be_used(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        cli.run(["bench", *words, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "seeds is 0; it must be from 1"),
        ({"jobs": 0}, "jobs is 0"),
        ({"points": 0}, "points is 0"),
        ({"transfer_samples": -1}, "transfer_samples is -1"),
        ({"rules": []}, "at least one rule"),
    ],
)
def test_numbers_that_cannot_be_used(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        bench(**{"rules": ["ctrl"], "problems": [TINY], "out": tmp_path / "x", **changes})


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bench_by_words_and_its_table_again(jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = ["bench", "--rules", "ctrl", "--problems", "gaussian-2d", "--seeds", "2", "--network-calls", "3000",
             "--reward-calls", "100", "--transfer-samples", "0", "--jobs", str(jobs), "--out", str(tmp_path / "out"),
             "--set", "ctrl.ratio_weight=0.5", *small]  # fmt: skip
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    assert "2/2 ctrl on gaussian-2d, kl_weight 0.5, seed" in said
    lines = resume_lines(tmp_path / "out" / "results.jsonl")
    assert sorted(line["seed"] for line in lines) == [0, 1]
    assert {line["config"]["rule"]["ratio_weight"] for line in lines} == {0.5}
    assert {line["config"]["batch_size"] for line in lines} == {16}
    assert cli.run(["bench", "--out", str(tmp_path / "out"), "--table"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("### gaussian-2d, kl_weight 0.5")
    assert table.strip() in said


MINE = """
import torch
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import mixture

def build(width: int = 8):
    return ResidualModel(mixture(2, 3, 0), 2, width=width)

def right(samples, prompts):
    return torch.tensor(samples[:, 0].tolist())
"""


def test_a_model_of_ones_own_meets_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = ["bench", "--rules", "ctrl", "draft", "--problems", f"{file}:build", "--option", "width=4", "--seeds", "1",
             "--network-calls", "3000", "--reward-calls", "100", "--transfer-samples", "0", "--reference-samples", "64",
             "--out", str(tmp_path / "out"), *small]  # fmt: skip
    with pytest.raises(ValueError, match=r"mine has no reward of its own; give one"):
        cli.run(words)
    assert cli.run([*words, "--reward", f"{file}:right"]) == 0
    assert "skipped: draft follows the reward's gradient, and the reward of mine has none." in capsys.readouterr().out
    (line,) = resume_lines(tmp_path / "out" / "results.jsonl")
    assert (line["rule"], line["problem"]) == ("ctrl", "mine")
    measured = json.loads((tmp_path / "out" / "yardsticks" / "mine.json").read_text())
    assert len(measured["rewards"]) == 64
    assert measured["problem"]["options"]["width"] == 4
    # the reward is the reference's first coordinate
    rewards = torch.tensor(measured["rewards"])
    expected = (
        own_problem(f"{file}:build", f"{file}:right")
        .build(0)
        .model.base.sample(20_000, torch.Generator().manual_seed(0))
    )
    assert abs(float(rewards.mean() - expected[:, 0].mean())) < 4 * float(rewards.std()) / 8


def test_a_pipeline_meets_the_rules(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import make, spelling_tokenizer

    make("sd", spelling_tokenizer()).save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    small = [word for name, value in {**SMALL, "batch_size": 4, "heldout_samples": 4}.items() if not name.startswith("value")
             for word in ("--set", f"{name}={value}")]  # fmt: skip
    words = ["bench", "--rules", "ctrl_pathwise", "ddpo", "--problems", str(tmp_path / "tiny"), "--reward", "brightness",
             "--prompts", str(tmp_path / "prompts.txt"), "--option", "lora_rank=2", "--seeds", "1", "--network-calls", "700",
             "--reward-calls", "30", "--transfer-samples", "0", "--reference-samples", "8", "--out", str(tmp_path / "out"),
             *small]  # fmt: skip
    assert cli.run(words) == 0
    lines = resume_lines(tmp_path / "out" / "results.jsonl")
    assert [(line["rule"], line["problem"]) for line in lines] == [("ctrl_pathwise", "tiny"), ("ddpo", "tiny")]
    assert all(0 < line["network_calls"] <= 700 and 0 < line["reward_calls"] <= 30 for line in lines)
    assert lines[0]["config"]["value"] == "surrogate"


def test_rules_that_need_a_gradient_are_skipped_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreact.algorithms.ctrl import CTRL

    assert skips("ctrl", PROBLEMS["fashion-jpeg"]) is None
    monkeypatch.setattr(CTRL, "differentiates_reward", True)
    assert skips("ctrl", TINY) is None
    sentence = skips("ctrl", PROBLEMS["fashion-jpeg"])
    assert sentence == "ctrl follows the reward's gradient, and the reward of fashion-jpeg has none."


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_search_space_inside_its_settings() -> None:
    from scoreact.algorithms.registry import rules

    for rule in rules():
        space = search_space(rule, Job(rule, TINY, 0, 0.5, 1, 1).config())
        assert ("learning_rate" in space) == (rules()[rule].minimiser == "adam")
        for name, choices in space.items():
            if isinstance(choices, tuple):
                low, high, scale = choices
                assert low < high, (rule, name)
                assert scale in ("log", "linear")
                assert scale == "linear" or low > 0


def test_a_value_that_takes_no_steps_has_none_to_search() -> None:
    network, linear = (
        search_space("ctrl", Job("ctrl", TINY, 0, 0.5, 1, 1, settings={"value": value}).config())
        for value in ("network", "linear")
    )
    assert set(network) - set(linear) == {"value_learning_rate", "value_batch_size", "value_steps", "value_first_steps"}
    assert linear["reference_batches"] == network["reference_batches"] == [4, 2, 1]


def test_a_search_looks_only_at_what_the_rule_uses() -> None:
    trpo = search_space("ctrl_trpo", Job("ctrl_trpo", TINY, 0, 0.5, 1, 1).config())
    assert not {"kl_states", "learning_rate", "epochs", "minibatch_size"} & set(trpo)
    assert {"max_kl", "ratio_weight", "value_steps"} <= set(trpo)
    ddpo = search_space("ddpo", Job("ddpo", TINY, 0, 0.5, 1, 1).config())
    assert not [name for name in ddpo if name.startswith(("value", "reference"))]


TUNED = sorted((Path(__file__).parents[2] / "benchmarks").glob("arena*/tuned/*.json"))


@pytest.mark.parametrize("path", TUNED, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_what_earlier_searches_found_can_be_used(path: Path) -> None:
    """Some hold settings that the rule does not use, as the states of a bound that it does not have."""
    found = json.loads(path.read_text(encoding="utf-8"))
    problem = PROBLEMS.get(found["problem"], ArenaProblem("shapes", "pipeline", 1, 1))
    common = found.get("common", {})
    config = Job(found["rule"], problem, 0, 0.5, 1, 1, common, found["settings"]).config()
    used = {**config.to_dict(), **config.rule}
    kept = [used[name] == value for name, value in found["settings"].items() if name in used]
    assert kept
    assert all(kept)
    assert config.average == (common | found["settings"])["average"]


def test_settings_that_no_run_uses_are_refused_and_those_that_some_use_are_not() -> None:
    jobs = [Job(rule, TINY, 0, 0.5, 1, 1, {"value_steps": 7, "clip_range": 0.3}) for rule in ("ctrl", "rwr")]
    assert [job.config().value_steps for job in jobs] == [7, 15]
    check_used(jobs, jobs[0].common, {"ctrl": {"trace": 0.5}})
    with pytest.raises(ValueError, match=r"^a setting of all runs: value_steps is a setting of ctrl, .*, not of rwr\."):
        check_used(jobs[1:], {"value_steps": 7}, {})
    with pytest.raises(
        ValueError, match=r"^rwr on tiny: max_kl is a setting of .*, not of rwr\. Leave out max_kl 0\.3, or"
    ):
        check_used(jobs, {}, {"rwr": {"max_kl": 0.3}})


def test_a_rules_own_search_is_used_and_a_wrong_name_in_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreact.algorithms.ctrl import CTRL

    config = Job("ctrl", TINY, 0, 0.5, 1, 1).config()
    monkeypatch.setattr(CTRL, "search", {"ratio_weight": (0.1, 2.0, "log"), "max_kl": [0.1, 0.2]}, raising=False)
    space = search_space("ctrl", config)
    assert space["ratio_weight"] == (0.1, 2.0, "log")
    assert space["max_kl"] == [0.5, 0.1, 0.2]  # the default is among the choices
    monkeypatch.setattr(CTRL, "search", {"ratio_wait": (0.1, 2.0, "log")})
    with pytest.raises(
        ValueError, match=r"ctrl searches 'ratio_wait', which is no setting of it; known: trust, .*, clip_range"
    ):
        search_space("ctrl", config)


needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra tune")


@needs_optuna
@pytest.mark.usefixtures("no_plots")
def test_tuning_continues_and_is_used_on_seeds_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget: dict[str, Any] = {"network_calls": 2_000, "reward_calls": 240}
    ran: list[Job] = []
    run_one = arena_run.run_one

    def watched(one: Job) -> Any:
        ran.append(one)
        return run_one(one)

    monkeypatch.setattr(arena, "run_one", watched)
    monkeypatch.setattr(tuning, "run_one", watched)
    found = tune("ctrl", TINY, 2, 2, out=tmp_path / "tuned", **budget)
    assert [one.seed - TUNING_SEEDS for one in ran] == [0, 1, 0, 1]
    assert {one.heldout_seed for one in ran} == {HELDOUT["tune"]}
    assert found["defaults"]["settings"]["learning_rate"] == 2e-3  # the first trial
    trials = resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl")
    assert max(trial["J"] for trial in trials) == found["J"]
    assert [trial["settings"]["learning_rate"] for trial in trials] == [
        one.settings["learning_rate"] for one in ran[::2]
    ]
    # continued: two are known, one is new
    more = tune("ctrl", TINY, 3, 2, out=tmp_path / "tuned", **budget)
    assert len(ran) == 6
    assert more["J"] >= found["J"]
    assert more["J"] == max(trial["J"] for trial in resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl"))
    # used, and kept beside the results
    tuned, plain = small_bench(tmp_path / "out", ["ctrl", "ctrl_pathwise"], seeds=1, tuned=tmp_path / "tuned")
    assert (tuned["tuned"], plain["tuned"]) == (True, False)
    assert tuned["config"]["learning_rate"] == more["settings"]["learning_rate"]
    assert ran[-1].seed == ran[-2].seed == 0
    assert ran[-1].heldout_seed != HELDOUT["tune"]
    kept = json.loads((tmp_path / "out" / "tuned" / "ctrl.tiny.json").read_text())
    assert kept["settings"] == more["settings"]
    assert "| tuned |" in (tmp_path / "out" / "table.md").read_text()


@needs_optuna
def test_a_search_can_start_from_what_earlier_ones_found(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    one, other = {"learning_rate": 3e-3, "batch_size": 20, "average": 0.7, "gone": 1}, {"learning_rate": 4.0}
    for name, settings in [("ctrl.series", one), ("ctrl.there", other), ("ctrl_trpo.there", {"learning_rate": 1e-3})]:
        (earlier / f"{name}.json").write_text(json.dumps({"settings": settings}))
    tune("ctrl", TINY, 3, 1, 2_000, 240, tmp_path / "tuned", start=earlier)
    tried = [line["settings"] for line in resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl")]
    assert [settings["learning_rate"] for settings in tried] == [2e-3, 3e-3, 2e-2]  # the last: the range's end
    assert [settings["batch_size"] for settings in tried] == [16, 16, 16]  # of 16 and 8, the nearer to 20
    assert [settings["average"] for settings in tried] == [0.9, 0.7, 0.9]
    assert all("gone" not in settings for settings in tried)
    with pytest.raises(ValueError, match="none' of settings to start from does not exist"):
        tune("ctrl", TINY, 3, 1, 2_000, 240, tmp_path / "tuned", start=tmp_path / "none")


@needs_optuna
def test_a_grid_is_tried_in_every_combination_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"learning_rate": ["1e-3", 4e-3, 0.001], "average": [0.0, 0.9]}
    found = tune("ctrl", TINY, None, 1, 2_000, 240, tmp_path / "tuned", grid=grid)
    trials = resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl")
    pairs = [(line["settings"]["learning_rate"], line["settings"]["average"]) for line in trials]
    assert pairs == [(1e-3, 0.0), (1e-3, 0.9), (4e-3, 0.0), (4e-3, 0.9)]
    assert len({line["J"] for line in trials}) == 4, "the settings change what is trained"
    assert found["J"] == max(line["J"] for line in trials)
    assert (found["defaults"], found["trials"]) == (None, 4)
    again = tune("ctrl", TINY, None, 1, 2_000, 240, tmp_path / "tuned", grid={**grid, "average": [0.9]})
    assert resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl") == trials, "what was tried is not tried again"
    assert (again["trials"], again["J"]) == (2, max(line["J"] for line in (trials[1], trials[3])))
    with pytest.MonkeyPatch.context() as patch:  # the pretrained model is measured once for all rules of a folder
        patch.setattr(referee, "measure", None)
        tune("ddpo", TINY, None, 1, 2_000, 240, tmp_path / "tuned", grid={"learning_rate": [1e-3]})
        with pytest.raises(ValueError, match="cannot be measured"):  # but anew for other settings of all runs
            tune("ddpo", TINY, None, 1, 2_000, 240, tmp_path / "tuned", grid={"epochs": [1]}, settings={"steps": 4})
    other = ArenaProblem("tiny", "gaussian", 20_000, 400, True, {"width": 16}, settings=SMALL, reference_samples=200)
    with pytest.raises(ValueError, match="knows another problem named tiny; rename it"):
        tune("ddpo", other, None, 1, 2_000, 240, tmp_path / "tuned", grid={"learning_rate": [5e-3]})
    dear = tune("ctrl", TINY, None, 1, 2_000, 240, tmp_path / "tuned", grid=grid, kl_weight=5.0)
    assert dear["kl_weight"] == 5.0
    assert len(resume_lines(tmp_path / "tuned" / "ctrl.tiny.trials.jsonl")) == 8, "at another price all is tried anew"
    words = [
        "--rule",
        "ddpo",
        "--problem",
        "gaussian-2d",
        "--kl-weight",
        "0.5",
        "--grid",
        "learning_rate=1e-3, 3e-3",
        "--seeds",
        "1",
    ]
    budget = ["--set", "batch_size=16", "--network-calls", "1000", "--reward-calls", "64"]
    cli.run(["tune", *words, *budget, "--out", str(tmp_path / "words")])
    said = capsys.readouterr().out
    bench = [
        "bench",
        "--rules",
        "ddpo",
        "--problems",
        "gaussian-2d",
        "--seeds",
        "1",
        "--tuned",
        str(tmp_path / "words"),
        *budget,
    ]
    cli.run([*bench, "--kl-weights", "0.5", "--transfer-samples", "0", "--out", str(tmp_path / "same")])
    assert "note: " not in capsys.readouterr().out
    cli.run([*bench, "--kl-weights", "2", "--transfer-samples", "0", "--out", str(tmp_path / "other")])
    assert "ddpo.gaussian-2d.json was searched at kl_weight 0.5, now 2." in capsys.readouterr().out
    assert json.loads((tmp_path / "words" / "ddpo.gaussian-2d.json").read_text())["kl_weight"] == 0.5
    assert "1/2 J" in said
    assert "learning_rate 0.003" in said
    assert "the defaults" not in said


@needs_optuna
@pytest.mark.slow
def test_tuning_beats_a_bad_learning_rate(tmp_path: Path) -> None:
    found = tune("ctrl", TINY, 10, 2, 60_000, 2_000, tmp_path, settings={"learning_rate": 2e-4})
    assert found["J"] > found["defaults"]["J"] + 0.02
    assert found["settings"]["learning_rate"] > 4e-4


@needs_optuna
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rule", "ctrl", "--problem", "serie"], r"unknown problem 'serie'; .* Did you mean 'series'\?"),
        (["--rule", "ctrll", "--problem", "series"], r"'ctrll'; known: .* Did you mean 'ctrl'\?"),
        (["--rule", "ctrl", "--problem", "series", "--reward-calls", "5"], r"5 reward calls are too few"),
        (["--problem", "series"], r"--rule"),
        (
            ["--rule", "ddpo", "--problem", "series", "--grid", "learning_rate=1e-3", "--trials", "2"],
            r"a grid says itself what is tried; leave out trials and start, or leave out the grid\.",
        ),
        (
            ["--rule", "ddpo", "--problem", "series", "--grid", "learning_rate"],
            r"--grid got 'learning_rate'; expected name=value",
        ),
        (
            ["--rule", "ddpo", "--problem", "series", "--grid", "learning_rat=1e-3"],
            r"unknown key 'learning_rat'; did you mean",
        ),
        (["--rule", "ddpo", "--problem", "series", "--grid", "learning_rate=1e-3,fast"], r"learning_rate is 'fast'"),
        (["--rule", "ddpo", "--problem", "series", "--grid", "value_steps=1,2"], r"value_steps"),
    ],
)
def test_tune_words_that_cannot_be_used(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        cli.run(["tune", *arguments, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
