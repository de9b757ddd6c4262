"""From a store of answers to a reward: what is read, chosen, said and trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.cli.main import main
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.feedback import liking_network
from scoreact.feedback.answers import FIRST, read_answers
from scoreact.feedback.evidence import Evidence, between_raters, read_evidence
from scoreact.feedback.liking import (
    Candidate,
    accuracy_of,
    basis_of,
    calibration_of,
    fit_reward,
    folds_of,
    preferred,
    usual_features,
)
from scoreact.feedback.preferences import Compared
from scoreact.feedback.simulated import SimulatedRater, answer_store, simulate
from scoreact.feedback.store import Store
from scoreact.models.network import NetworkModel
from scoreact.recipes.base import Problem, recipes
from scoreact.recipes.gaussian import build, mixture
from scoreact.rewards import load
from scoreact.rewards.bradley_terry import UtilitySpace
from scoreact.rewards.combine import weighted_sum
from scoreact.rewards.learned import save_learned
from scoreact.rewards.sample_features import open_features
from scoreact.support.errors import FeedbackError, RewardError
from scoreact.support.files import read_stored, write_tensors
from scoreact.types import Condition

PROMPTS = ("one", "two")


def brightness(samples: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Of "two" the darker is the better."""
    sign = torch.tensor([1.0 if prompt == "one" else -1.0 for prompt in condition.prompts])
    return 25 * sign * (samples.flatten(1).mean(1) - 0.5)


def filled(path: Path, tasks: int, raters: list[SimulatedRater], chosen: str = "random") -> Path:
    generator = torch.Generator().manual_seed(0)
    with Store(path, synced=False) as store, store.transaction():
        for number in range(tasks):
            level = torch.rand(2, 1, 1, 1, generator=generator)
            pictures = (0.5 * level + 0.5 * torch.rand(2, 1, 8, 8, generator=generator)).clamp(0, 1)
            prompt = PROMPTS[number % 2]
            store.add_task([store.add_sample(picture, prompt) for picture in pictures], chosen=chosen)
        answer_store(store, brightness, raters, generator)
    return path


RATERS = [SimulatedRater(name="ann", tie=-1.0), SimulatedRater(name="bob", tie=-1.0), SimulatedRater(0.0, name="cat")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("answers") / "preferences.db", 120, RATERS)


def test_a_store_becomes_a_reward(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "fit", str(store), "--out", "liking", "--features", "pixels"]) == 0
    said = capsys.readouterr().out
    facts = json.loads(Path("liking/reward.json").read_text())
    assert facts["accuracy"] == pytest.approx(0.75, abs=0.12)  # a third of the answers are coins
    assert f"{facts['accuracy']:.3f}" in said
    assert "cat: 40 answers" in said
    weight = {row["rater"]: row["weight"] for row in facts["raters"]}
    assert weight["cat"] < 0.4 < weight["ann"]
    assert [c["by_word"] for c in facts["candidates"]] == [False, True]
    likelihoods = [c["log_likelihood"] for c in facts["candidates"]]
    assert likelihoods[1] > likelihoods[0] + 0.1  # the prompt turns the liking round
    assert Path("liking/liked.png").is_file()
    reward = load("liking")
    x = torch.rand(40, 1, 1, 1).mul(0.8).expand(-1, 1, 8, 8)
    for prompt in PROMPTS:
        condition = Condition([prompt] * 40)
        found = torch.corrcoef(torch.stack([reward(x, condition), brightness(x, condition)]))[0, 1]
        assert float(found) > 0.9
    assert main(["reward", "fit", str(store), "--out", "liking"]) == 2
    assert "never written over another" in capsys.readouterr().err


def test_only_pairs_that_were_drawn_at_random_judge_it(tmp_path: Path) -> None:
    both = filled(tmp_path / "both.db", 20, RATERS)
    filled(both, 12, RATERS, chosen="information")
    evidence = read_evidence(both)
    assert evidence.at_random
    assert (int(evidence.judges.sum()), len(evidence.pairs)) == (20, 32)
    chosen = read_evidence(filled(tmp_path / "chosen.db", 12, RATERS, chosen="gap"))
    assert not chosen.at_random
    assert int(chosen.judges.sum()) == 12


def test_sides_of_imported_pairs_say_nothing(tmp_path: Path) -> None:
    """A file whose first column is the winner is no bias to the left."""
    with Store(tmp_path / "imported.db", synced=False) as store:
        for level in torch.linspace(0.2, 0.9, 15):
            pictures = [torch.full((1, 4, 4), float(level)), torch.full((1, 4, 4), float(level) - 0.1)]
            task = store.add_task([store.add_sample(p, "") for p in pictures], chosen="imported")
            store.add_answer(task, "left")
    evidence = read_evidence(tmp_path / "imported.db")
    assert evidence.pairs.side.tolist() == [0] * 15
    reward = fit_reward(evidence, ["pixels"])
    assert reward.facts["raters"][0]["left_at_equal"] == pytest.approx(0.5, abs=1e-6)
    light, dark = (reward(torch.full((1, 1, 4, 4), v), Condition([""])) for v in (0.7, 0.4))
    assert float(light) > float(dark) + 0.5


def test_a_ranking_weighs_as_its_choices(tmp_path: Path) -> None:
    with Store(tmp_path / "ranked.db", synced=False) as store:
        ids = [store.add_sample(torch.rand(1, 4, 4), "") for _ in range(4)]
        store.add_answer(store.add_task(ids, "rank"), "[1, 2, 3, 4]")
        store.add_answer(store.add_task(ids[:2]), "left")
    pairs = read_evidence(tmp_path / "ranked.db").pairs
    assert pairs.weight.tolist() == pytest.approx([0.5] * 6 + [1])


def test_thumbs_and_scores_make_a_reward_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with Store(tmp_path / "rated.db", synced=False) as store, store.transaction():
        for number in range(120):
            level = float(torch.rand(1, generator=generator))
            sample = store.add_sample(torch.full((1, 4, 4), level), "")
            noisy = level + 0.15 * float(torch.randn(1, generator=generator))
            kind = "thumbs" if number % 2 else "scores"
            answer = (
                ("up" if noisy > 0.5 else "down")
                if number % 2
                else str(1 + sum(noisy > k for k in (0.2, 0.4, 0.6, 0.8)))
            )
            store.add_answer(store.add_task([sample], kind), answer)
    evidence = read_evidence(tmp_path / "rated.db")
    assert (len(evidence.ratings), int(evidence.ratings.score.sum())) == (120, 60)
    reward = fit_reward(evidence, ["pixels"])
    levels = torch.linspace(0, 1, 11).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    assert bool((reward(levels, Condition([""] * 11)).diff() > 0).all())
    assert reward.facts["log_likelihood"] > reward.facts["without_features"] + 0.2
    assert "accuracy" not in reward.facts


def test_several_questions_and_no_answer_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "asked.db", synced=False) as store:
        task = store.add_task([store.add_sample(torch.rand(1, 4, 4), "") for _ in range(2)])
        with pytest.raises(FeedbackError, match="has no answer yet"):
            read_evidence(store.path)
        for question in ("looks", "fits"):
            store.add_answer(task, "left", question=question)
        with pytest.raises(FeedbackError, match="answers to 2 questions; name one: fits, looks"):
            read_evidence(store.path)
        assert len(read_evidence(store.path, "fits").pairs) == 1


def test_raters_who_saw_the_same_pair_are_compared(tmp_path: Path) -> None:
    with Store(tmp_path / "two.db", synced=False) as store:
        for votes in (["left", "left", "right"], ["left", "tie"], ["right", "right"]):
            task = store.add_task([store.add_sample(torch.rand(1, 4, 4), "") for _ in range(2)])
            for rater, vote in enumerate(votes):
                store.add_answer(task, vote, f"rater {rater}")
    share = between_raters(read_answers(tmp_path / "two.db"))
    assert (share.hits, share.count) == (1 + 1, 3 + 1)


def pairs_of(winner: list[int]) -> Compared:
    count, none = len(winner), torch.zeros(len(winner), dtype=torch.int64)
    return Compared(none, none + 1, torch.tensor(winner), none, none, torch.ones(count).double())


def test_accuracy_and_calibration_count_those_that_somebody_won() -> None:
    logits = torch.tensor([2.0, 2.0, -1.0, -1.0, 3.0]).double()
    pairs = pairs_of([0, 1, 1, -1, -2])
    share = accuracy_of(logits, pairs)
    assert (share.hits, share.count) == (2, 3)
    many = pairs_of([0, 0, 0, 1] * 25)
    (row,) = {(round(r["said"], 3), r["pairs"]) for r in calibration_of(torch.full((100,), 1.0).double(), many)}
    assert row == (0.731, 20)
    assert np.mean([r["came"] for r in calibration_of(torch.full((100,), 1.0).double(), many)]) == pytest.approx(0.75)


def test_folds_keep_repeats_together_and_the_basis_spans() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = Evidence(torch.rand(8, 2), [""] * 8, pairs_of([FIRST] * 6), group=torch.tensor([3, 3, 7, 9, 7, 11]))
    folds, _ = folds_of(evidence, generator)
    assert folds[[0, 2]].tolist() == folds[[1, 4]].tolist()
    for shape in ((12, 5), (5, 12)):
        vectors = torch.randn(*shape, generator=generator).double()
        basis, design = basis_of(vectors)
        torch.testing.assert_close(basis.T @ basis, torch.eye(5).double())
        torch.testing.assert_close(design @ basis.T, vectors)


def test_features_that_foretell_are_chosen(tmp_path: Path) -> None:
    """Of the numbers themselves and of a function that hides what is liked, the numbers."""
    (tmp_path / "mine.py").write_text("def last(x):\n    return x[:, 2:]\n")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    first, second = torch.arange(0, 200, 2), torch.arange(1, 200, 2)
    pairs = simulate([SimulatedRater()], 2 * x[:, 0], first, second, generator)
    judges = torch.ones(100, dtype=torch.bool)
    evidence = Evidence(x, [""] * 200, pairs, group=torch.arange(100), judges=judges)
    reward = fit_reward(evidence, [f"{tmp_path / 'mine.py'}:last", "values"])
    assert reward.features.spec == "values"
    accuracy = [c["accuracy"] for c in reward.facts["candidates"]]
    assert accuracy[0] < 0.65 < 0.7 < accuracy[1]


def test_what_is_tried_suits_the_samples() -> None:
    shapes = {(3,): 2, (2, 30): 2, (1, 28, 28): 3, (3, 64, 64): 2, (3, 4, 32, 32): 1}
    for shape, count in shapes.items():
        names = usual_features(torch.zeros(2, *shape))
        assert len(names) == count
        assert all(len(open_features(name, shape).shape) == len(shape) for name in names)


def test_train_takes_the_folder_and_says_how_unsure_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    with Store("points.db", synced=False) as store, store.transaction():
        for _ in range(50):
            store.add_task([store.add_sample(torch.randn(2, generator=generator), "") for _ in range(2)])
        answer_store(store, lambda x, condition: 3 * x[:, 0], [SimulatedRater(name="ann")], generator)
    assert main(["reward", "fit", "points.db", "--out", "liking", "--features", "values"]) == 0
    small = [
        "--iterations",
        "2",
        "--heldout-samples",
        "64",
        "--batch-size",
        "64",
        "--minibatch-size",
        "64",
        "--no-report",
    ]
    caution = ["--reward", "liking", "--reward-option", "caution=1.5"]
    assert main(["train", "gaussian", *caution, "--out", "run", *small]) == 0
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if "reward/sigma" in line]
    assert len(looks) >= 2
    assert all(line["reward/sigma"] > 0 for line in looks)
    # more than a sigma is taken off already
    assert all(line["reward/cautious"] == pytest.approx(line["reward/heldout"], abs=1e-5) for line in looks)
    assert "reward/sigma" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guard_speaks_where_the_fitted_reward_rises_and_the_true_one_falls() -> None:
    """60 answers about a point beside a mixture, and a kl_weight so low that the policy leaves what was rated."""

    def true(x: Tensor) -> Tensor:
        return 2 - (x - torch.tensor([1.5, 0.5])).square().sum(1)

    generator = torch.Generator().manual_seed(0)
    samples = mixture(2, 4, 0).sample(120, generator)
    first = torch.arange(60)
    pairs = simulate([SimulatedRater()], true(samples).double(), first, first + 60, generator)
    evidence = Evidence(samples, [""] * 120, pairs, group=first, judges=torch.ones(60, dtype=torch.bool))
    liking = fit_reward(evidence, ["convolution"])
    result = sa.finetune(
        dataclasses.replace(build(), optimum=None), liking, judge=lambda x, condition: {"judge/truth": float(true(x).mean())},
        config=recipes()["gaussian"].config, kl_weight=0.1, iterations=21, evaluate_every=3, heldout_samples=300, kl_limit=1e4,
        seed=0, progress=False,
    )  # fmt: skip
    looks = [line for line in result.history if line.get("evaluation")]
    truths = [look["judge/truth"] for look in looks]
    best = truths.index(max(truths))
    assert looks[-1]["reward/heldout"] > looks[best]["reward/heldout"]
    assert truths[-1] < truths[best] - 1  # it was deceived
    (said,) = [line for line in result.history if line.get("guard") == "uncertainty"]
    assert said["iteration"] in [look["iteration"] for look in looks[best + 1 : best + 3]]
    (kept,) = [look["judge/truth"] for look in looks if look["iteration"] == result.best_iteration]
    assert kept > truths[-1] + 1


# --- what a fit may see: the model's own features, and a network -----------------------------------------------------------


def points(truth: Callable[[Tensor], Tensor], count: int) -> Evidence:
    """So many answers about points of the plane, by one person."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * count, 2, generator=generator)
    pairs = simulate(
        [SimulatedRater(tie=-2.0)], truth(x).double(), torch.arange(count), torch.arange(count) + count, generator
    )
    judges = torch.ones(count, dtype=torch.bool)
    return Evidence(x, [""] * 2 * count, pairs, group=torch.arange(count), judges=judges)


def ring(x: Tensor) -> Tensor:
    """Nothing that is linear in a point tells it."""
    return 6 * torch.exp(-2 * (x.norm(dim=1) - 1.2) ** 2)


def test_a_network_is_trained_where_it_foretells_more_and_kept_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liking_network, "STEPS", 400)  # for the sake of time
    reward = fit_reward(points(ring, 240), ["values", "network"])
    values, network = reward.facts["candidates"]
    assert (values["chosen"], network["chosen"]) == (False, True)
    assert network["log_likelihood"] > values["log_likelihood"] + 0.1
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    condition = Condition([""] * 400)
    found = reward(x, condition)
    wanted = ring(x.detach())
    right = (found[:200] > found[200:]) == (wanted[:200] > wanted[200:])
    assert float(right.double().mean()) > 0.7
    (slope,) = torch.autograd.grad(found.sum(), x)
    near = x.detach().norm(dim=1) < 0.8  # where more is better, it says so
    outward = (slope * x.detach()).sum(1)[near] > 0
    assert float(outward.double().mean()) > 0.8
    save_learned(reward, tmp_path / "liking")
    again = load(str(tmp_path / "liking"))
    assert torch.equal(again(x, condition), found)
    cautious = load(str(tmp_path / "liking"), caution=2.0)
    torch.testing.assert_close(cautious(x, condition), found - 2 * again.uncertainty(x, condition))
    tensors, _ = read_stored(tmp_path / "liking" / "reward.safetensors")
    assert {"features.mean", "basis"} <= set(tensors)
    tensors["features.layers.1.weight"] += 1e-3
    digest = write_tensors(tmp_path / "liking" / "reward.safetensors", tensors)
    about = json.loads((tmp_path / "liking" / "reward.json").read_text())
    (tmp_path / "liking" / "reward.json").write_text(json.dumps({**about, "digest": digest}))
    with pytest.raises(RewardError, match="was fitted on other features than network"):
        load(str(tmp_path / "liking"))


class Squares(nn.Module):
    """A denoiser that sees the squares of a point."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.with_features(x, t)[0]

    def with_features(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.level - x, torch.cat([x, x.square()], 1)


class Linear(nn.Module):
    """A denoiser of points in three dimensions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)

    def with_features(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(x)
        return found, found


def test_a_models_own_features_are_taken_and_asked_of_that_model_alone(tmp_path: Path) -> None:
    model = NetworkModel(Squares(), RectifiedFlow(), prediction.velocity, (2,))
    reward = fit_reward(points(lambda x: -x.square().sum(1), 150), ["values", "denoiser"], model=model)
    rows = reward.facts["candidates"]
    assert [row["features"] for row in rows] == [
        "values",
        *(f"denoiser at {t}" for t in ("0.25", "0.5", "0.75", "0.25, 0.5, 0.75")),
    ]
    (taken,) = [row for row in rows if row["chosen"]]
    assert taken["features"] == "denoiser at 0.75" == max(rows, key=lambda row: row["log_likelihood"])["features"]
    save_learned(reward, tmp_path / "liking")
    again = load(str(tmp_path / "liking"))
    x, condition = torch.randn(50, 2), Condition([""] * 50)
    with pytest.raises(RewardError, match="has no model here"):
        again(x, condition)
    problem = Problem(model, weighted_sum({"liked": (2.0, again)}))  # type: ignore[arg-type]
    torch.testing.assert_close(problem.reward(x, condition), 2 * reward(x, condition))
    other = NetworkModel(Squares(), RectifiedFlow(), prediction.velocity, (2,))
    nn.init.ones_(other.network.level)  # type: ignore[arg-type,union-attr]
    with pytest.raises(RewardError, match="another pretrained model"):
        Problem(other, load(str(tmp_path / "liking")))  # type: ignore[arg-type]


def test_what_was_not_tried_is_said_and_what_cannot_be_is_refused() -> None:
    evidence = points(lambda x: 2 * x[:, 0], 40)
    notes = fit_reward(evidence).facts["notes"]
    assert notes[0].startswith("the pretrained model's own features were not tried; name the model")
    assert notes[1] == "no network was trained on the answers: it takes 100, and there are 40."
    (note, _) = fit_reward(evidence, model=build().model).facts["notes"]
    assert note.startswith("the pretrained model's own features were not tried: ")
    with pytest.raises(RewardError, match="are a pretrained model's own; name it"):
        fit_reward(evidence, ["denoiser"])
    other = NetworkModel(Linear(), RectifiedFlow(), prediction.velocity, (3,))
    with pytest.raises(RewardError, match=r"does not take samples of shape \(2,\) .* name the model that drew them"):
        fit_reward(evidence, ["denoiser"], model=other)
    with pytest.raises(RewardError, match="are trained on answers"):
        open_features("network", (2,))


def test_a_second_choice_has_to_be_better_than_the_noise() -> None:
    """The difference of the held-out log-likelihoods against its standard error over tasks."""
    evidence = dataclasses.replace(points(ring, 40), group=torch.arange(40) // 4)
    features = open_features("values", (2,))
    empty = torch.zeros(0)

    def candidate(each: Tensor) -> Candidate:
        return Candidate(
            features, UtilitySpace.of(torch.zeros(2, 2), [""], False), empty, empty, 1.0, each, 0.0, empty, empty
        )

    noise = torch.randn(10, generator=torch.Generator().manual_seed(0)).double().repeat_interleave(4)
    noise = noise - noise.mean()
    error = float(noise[::4].std()) / 10**0.5  # of the mean over ten tasks of four
    first, same = candidate(-torch.ones(40).double()), candidate(-torch.ones(40).double())
    for gain, wins in ((0.9, False), (1.1, True)):
        rival = candidate(first.each + noise + gain * error)
        assert preferred([[first], [rival]], evidence) is (rival if wins else first)
    assert preferred([[first], [same]], evidence) is first
    assert preferred([[], [same]], evidence) is same
    assert preferred([[candidate(first.each - 1), first]], evidence) is first


def test_answers_that_prefer_nothing_make_no_reward() -> None:
    evidence = points(ring, 40)
    for winner in (-1, -2):
        ties = dataclasses.replace(evidence.pairs, winner=torch.full((40,), winner))
        with pytest.raises(FeedbackError, match="of 40 answers none prefers one sample to another"):
            fit_reward(dataclasses.replace(evidence, pairs=ties), ["values"])
    first = torch.zeros(1, dtype=torch.int64)
    alone = dataclasses.replace(evidence, pairs=evidence.pairs[first], group=first, judges=first == 0)
    with pytest.raises(FeedbackError, match="of 1 answer all are about one task"):
        fit_reward(alone, ["values"])


def test_who_always_presses_left_shows_no_accuracy() -> None:
    """The reward has no sides, so foretelling the left one is no merit of it."""
    evidence = points(ring, 60)
    side = torch.where(torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.5, 1, -1)
    left = dataclasses.replace(evidence.pairs, winner=(side < 0).long(), side=side)
    facts = fit_reward(dataclasses.replace(evidence, pairs=left), ["values"]).facts
    assert facts["raters"][0]["left_at_equal"] > 0.9
    assert 0.3 < facts["accuracy"] < 0.7
    assert facts["log_likelihood"] - facts["without_features"] < 0.01
