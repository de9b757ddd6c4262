"""Rewards from outside: late, in any order, twice, missing; a window, a budget, a bound, and the same bits after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problem import Setup
from tiny_pipelines import make, spelling_tokenizer
from torch import Tensor, nn

import scoreact as sa
from scoreact.api.saved_run import SavedRun
from scoreact.cli import main as cli
from scoreact.control.rollout import rollout
from scoreact.evaluation.optimum import estimate_optimum
from scoreact.feedback.online import HandedOut, HandedPaths, check_off_policy
from scoreact.feedback.reward_file import read_rewards
from scoreact.feedback.window import UpdatePlan, Window, below_reference, worth
from scoreact.recipes.gaussian import build
from scoreact.support.errors import Diverged, FeedbackError, SettingError
from scoreact.support.files import read_tensors, write_tensors
from scoreact.training.config import Config, updated

SMALL: dict[str, Any] = {
    "kl_weight": 0.5, "steps": 4, "batch_size": 32, "value_steps": 2, "value_first_steps": 2, "value_batch_size": 16,
    "minibatch_size": 64, "kl_states": 16, "device": "cpu",
}  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    found = build(width=16).model
    assert isinstance(found, nn.Module)
    return found


def right(samples: Tensor) -> Tensor:
    return samples[:, 0]


def begun(folder: Path, **settings: Any) -> SavedRun:
    sa.finetune(model(), "outside", out=folder, progress=False, **{**SMALL, **settings})
    return sa.open_run(folder, model=model)


def weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_worth_of_another_policys_paths_is_that_of_the_references() -> None:
    s = Setup(moved=0.3, steps=4)
    s.model.eval()
    ts = torch.linspace(s.sde.schedule.t_min, s.sde.schedule.t_max, 5)
    condition, generator = s.policy.condition([""] * 10000), torch.Generator().manual_seed(1)
    mine, reference = (
        rollout(s.policy, s.sde, s.solver, ts, condition, generator, reference_only=only) for only in (False, True)
    )
    beta = 0.7
    reward, base = right(mine.xs[-1]), right(reference.xs[-1])
    log_ratio = mine.log_ratio_to_reference()
    assert float(mine.path_kl().mean()) > 0.05
    found, wanted = worth(reward, log_ratio, condition, beta), estimate_optimum(base, condition, beta)
    assert found["online/J_star_low"] < wanted["objective/J_star_high"]
    assert wanted["objective/J_star_low"] < found["online/J_star_high"]
    assert found["online/J_star"] == pytest.approx(wanted["objective/J_star"], abs=0.04)
    j = float((reward - beta * mine.path_kl()).mean())
    assert found["online/J"] == pytest.approx(j, abs=4 * found["online/J_se"])


def test_below_reference_speaks_where_the_policy_paid_for_nothing_alone() -> None:
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    log_ratio = 0.8 * noise + 0.32  # of a path KL of 0.32 nats
    rewards = -noise  # and the policy went where the reward is low: J_ref 0.8 above its mean
    found = below_reference(rewards, log_ratio, 0.1)
    assert found is not None
    assert found[0] == pytest.approx(-0.032, abs=0.05)
    assert found[1] == pytest.approx(0.8, abs=0.1)
    assert below_reference(noise, log_ratio, 0.1) is None


def test_a_window_is_bounded_and_draws_the_old_less_often() -> None:
    window = Window(UpdatePlan(64, half_life=16))
    assert window.add({i: float(i) for i in range(50)}) == 0
    assert window.add({i: float(i) for i in range(50, 80)}) == 16
    assert list(window.rewards) == list(range(16, 80))
    assert window.ages().tolist() == list(range(63, -1, -1))
    generator = torch.Generator().manual_seed(0)
    counts = sum(torch.bincount(window.draw(8, generator), minlength=64) for _ in range(2000))
    assert float(counts[-16:].sum() / counts[-32:-16].sum()) == pytest.approx(2, abs=0.25)
    assert sorted(window.draw(64, generator).tolist()) == list(range(64))
    assert torch.bincount(window.draw(100, generator), minlength=64).min() == 1
    again = Window.of(json.loads(json.dumps(window.state_dict())))
    assert again == window
    with pytest.raises(SettingError, match="window is 3 rewards; give at least 32"):
        UpdatePlan(3)


def test_rewards_late_in_any_order_twice_or_missing(tmp_path: Path) -> None:
    one, two = begun(tmp_path / "a"), begun(tmp_path / "b")
    early, later = (run.hand_out(count=48) for run in (one, one))  # the second before the first one's rewards come
    assert [list(early.ids), list(later.ids)] == [list(range(48)), list(range(48, 96))]
    for wanted in (early, later):
        assert torch.equal(two.hand_out(count=48).samples, wanted.samples)
    r, s = right(early.samples).tolist(), right(later.samples).tolist()
    one.update(early, r)
    two.update([*reversed(early.ids), 3], [*reversed(r), r[3]])
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert one.update(later, s).metrics["online/lag"] == 1.0  # both are of the policy before the first update
    found = two.update(later, [None if i == 7 else value for i, value in enumerate(s)])
    assert [found.metrics[f"online/{name}"] for name in ("rewards", "window")] == [47, 95]
    found = two.update([55, *early.ids], [s[7], *r])
    assert found.notes == ["48 rewards were given before and count once."]
    assert [found.metrics[f"online/{name}"] for name in ("rewards", "window")] == [1, 96]


def test_what_cannot_be_right_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(FeedbackError, match="never handed out, nor any other"):
        run.update([0], [1.0])
    handed = run.hand_out(count=40)
    rewards = right(handed.samples).tolist()
    run.update(handed, rewards)
    before, state = weights(tmp_path / "run"), sorted((tmp_path / "run" / "checkpoints").iterdir())
    more = run.hand_out(count=4)
    refused: list[tuple[list[int], list[float | None], str]] = [
        ([40, 41], [1.0, float("nan")], "reward of sample 41 is nan"),
        ([40, 41], [1.0, float("inf")], "reward of sample 41 is inf"),
        ([40, 44], [1.0, 1.0], "sample 44 was never handed out; ids go from 0 to 43"),
        ([40, 2], [1.0, rewards[2] + 1], "sample 2 has the reward"),
        ([40, 40], [1.0, 2.0], "sample 40 has two rewards, 1 and 2"),
        ([40, 41], [1.0], "2 samples and 1 rewards"),
        ([40, 41], [None, None], "no reward is given"),
        ([0, 1], rewards[:2], "none of 2 rewards is new"),
    ]
    for ids, values, text in refused:
        with pytest.raises(FeedbackError, match=text):
            run.update(ids, values)
    assert same(before, weights(tmp_path / "run"))
    assert state == sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(more) == 4


def test_a_reward_that_is_no_log_probability_is_refused_where_one_is_wanted(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", value_loss="log_probability")
    handed = run.hand_out(count=40)
    with pytest.raises(FeedbackError, match=r"is 0\.5, and this run takes rewards for log-probabilities"):
        run.update(handed, [-1.0] * 39 + [0.5])
    assert run.update(handed, -right(handed.samples).exp()).metrics["online/rewards"] == 40


def test_a_damaged_file_of_paths_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    handed = run.hand_out(count=40)
    path = tmp_path / "run" / "online" / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(sa.RunError, match=r"00000000\.safetensors cannot be read"):
        run.update(handed, right(handed.samples))


def test_old_paths_are_dropped_and_their_rewards_come_too_late(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", steps=2)
    lost = run.hand_out(count=4)
    for _ in range(5):
        handed = run.hand_out(count=40)
        found = run.update(handed, right(handed.samples), window=32)
    assert found.metrics["online/window"] == 32
    assert found.metrics["online/dropped"] == 40
    kept = sorted(int(path.stem) for path in (tmp_path / "run" / "online").iterdir())
    assert 0 not in kept
    assert len(kept) <= 5
    fresh = run.hand_out(count=1)
    found = run.update([*lost.ids, *fresh.ids], torch.ones(5))
    assert found.metrics["online/late"] == 4
    assert found.notes[0].startswith("4 rewards came too late")


def test_a_run_opened_anew_for_every_call_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole")
    begun(tmp_path / "cut")
    ends = {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        for number in range(2):
            run = whole if name == "whole" else sa.open_run(folder, model=model)
            handed = run.hand_out(count=40)
            if name == "cut" and number == 1:  # a kill after the checkpoint and before the weights
                old = weights(folder)
                run.update(handed, right(handed.samples))
                write_tensors(folder / "model.safetensors", old)
                sa.open_run(folder, model=model).hand_out(count=1)
            else:
                run.update(handed, right(handed.samples))
        ends[name] = weights(folder)
    assert same(ends["whole"], ends["cut"])


def test_an_update_that_is_lost_is_made_again_the_same(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    first, second = run.hand_out(count=40), run.hand_out(count=40)
    run.update(first, right(first.samples))
    shutil.copytree(tmp_path / "run", tmp_path / "before")  # as a kill in the middle of the next one leaves it
    for name in ("run", "before"):
        sa.open_run(tmp_path / name, model=model).update(second, right(second.samples))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "before"))


def test_a_training_that_goes_on_keeps_the_window(tmp_path: Path) -> None:
    settings = {
        **SMALL,
        "iterations": 1,
        "reference_batches": 1,
        "heldout_samples": 8,
        "value_loss": "soft",
        "value_replay": 3,
    }
    sa.finetune(model(), lambda x: x[:, 0], out=tmp_path / "run", progress=False, report=False, **settings)
    run = sa.open_run(tmp_path / "run", model=model, reward=lambda x: x[:, 0])
    handed = run.hand_out(count=40)
    run.update(handed, right(handed.samples))
    assert run._online is not None
    assert run._online._session is not None
    assert len(run._online._session.trainer.value.memory) == 1  # V knows the window alone, and no path of the training
    run.resume(iterations=4, report=False)
    again = sa.open_run(tmp_path / "run", model=model, reward=lambda x: x[:, 0])
    fresh = again.hand_out(count=4)
    assert again.update(fresh, right(fresh.samples)).metrics["online/window"] == 44


def test_an_update_costs_what_is_said(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", epochs=8)
    spent = []
    for calls in (0, 0, 0, 900, 900):
        handed = run.hand_out(count=40)
        before = run.history[-1]["cost/network_calls"] if run.history else 0
        found = run.update(handed, right(handed.samples), calls=calls)
        spent.append(found.metrics["cost/update_network_calls"])
        assert found.metrics["cost/network_calls"] - before == spent[-1]
    assert spent[1] == spent[2] > 1000  # the first paths are of the present policy, which spares a look
    assert 500 < spent[3] == spent[4] <= 900
    state = sorted((tmp_path / "run" / "checkpoints").iterdir())
    handed = run.hand_out(count=40)
    with pytest.raises(
        SettingError, match="network calls fewer than its first minibatch and its bound need; raise calls"
    ):
        run.update(handed, right(handed.samples), calls=300)
    assert state == sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert run.update(handed, right(handed.samples)).metrics["cost/update_network_calls"] == spent[3]  # 900 still holds


def test_the_bound_on_path_kl_holds_whatever_the_rewards(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", max_kl=0.002, learning_rate=0.05)
    for _ in range(3):
        handed = run.hand_out(count=40)
        found = run.update(handed, 1000 * right(handed.samples))
        assert found.metrics["policy/step_kl"] <= 0.002
    assert found.metrics["policy/step_share"] < 1


def test_a_path_kl_over_its_limit_ends_in_a_sentence_and_leaves_the_run(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", kl_limit=0.003, learning_rate=0.05)
    for _ in range(2):  # the first update moves it by more, which the paths drawn after it tell
        handed = run.hand_out(count=40)
        before = weights(tmp_path / "run")
        if handed.ids[0] == 0:
            run.update(handed, 10 * right(handed.samples), window=32)
    with pytest.raises(Diverged, match=r"over kl_limit 0\.003"):
        run.update(handed, 10 * right(handed.samples))
    assert same(before, weights(tmp_path / "run"))
    assert sa.open_run(tmp_path / "run", model=model).hand_out(count=1).ids[0] == 80


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"algorithm": "ram"}, "ram learns from the present policy's samples alone"),
        ({"algorithm": "dpok"}, "dpok learns from .*; rules that learn online: ctrl, ctrl_pathwise, q_learning"),
        ({"algorithm": "ctrl_trpo"}, "ctrl_trpo takes natural gradients"),
        ({"algorithm": "ctrl", "value": "residual"}, "value residual asks the reward by itself"),
        ({"algorithm": "ctrl", "grid": "random"}, "grid is random"),
    ],
)
def test_rules_that_late_rewards_mislead_are_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=text):
        check_off_policy(updated(Config(), settings))
    with pytest.raises(SettingError, match=text):
        sa.finetune(model(), "outside", out=tmp_path / "run", progress=False, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rule", ["ctrl", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("ctrl_pathwise", "q_learning"))]
)
def test_a_policy_follows_rewards_that_turn_round(rule: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", algorithm=rule, batch_size=128, kl_weight=1.0, learning_rate=0.02, value_steps=10,
                value_first_steps=40, value_batch_size=128, value_learning_rate=0.01, average=0.5)  # fmt: skip
    means = []
    for sign in (1.0, -1.0):
        for _ in range(5):
            handed: HandedOut = run.hand_out(count=64)
            run.update(handed, sign * right(handed.samples), window=128)
        means.append(float(right(run.sample(count=2000)).mean()))
    variance = float(right(run.sample(count=2000, reference=True)).var())
    middle = float(right(run.sample(count=2000, reference=True)).mean())
    # the optimum of a Gaussian's mean moves by variance / beta; 320 samples either way bring it half of that at least
    assert means[0] - middle > 0.5 * variance
    assert middle - means[1] > 0.4 * variance


def test_a_surrogate_knows_the_window_alone(tmp_path: Path) -> None:
    own = {name: value for name, value in SMALL.items() if not name.startswith("value")}
    own |= {"batch_size": 128, "kl_weight": 1.0, "learning_rate": 0.02, "average": 0.5}
    sa.finetune(
        model(), "outside", out=tmp_path / "run", progress=False, algorithm="ctrl_pathwise", value="surrogate", **own
    )
    run = sa.open_run(tmp_path / "run", model=model)
    means, seen = [], []
    for sign in (1.0, -1.0):
        for _ in range(4):
            handed = run.hand_out(count=64)
            metrics = run.update(handed, sign * right(handed.samples), window=128).metrics
            seen.append(metrics["surrogate/explained_variance"])
            assert metrics["surrogate/samples"] == metrics["online/window"]
        means.append(float(right(run.sample(count=1000)).mean()))
    before = right(run.sample(count=1000, reference=True))
    # an optimum's mean is moved by variance / beta
    assert means[0] - float(before.mean()) > 0.4 * float(before.var())
    assert float(before.mean()) - means[1] > 0.3 * float(before.var())
    # it is told off by rewards that it has not seen: at first of the other sign, and after a window of them no more
    assert seen[4] < -1
    assert min(*seen[:4], *seen[6:]) > 0.9
    handed = run.hand_out(count=40)
    with pytest.raises(SettingError, match="half_life is 8, and a surrogate of the reward remembers all"):
        run.update(handed, right(handed.samples), half_life=8)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for one in (run, sa.open_run(tmp_path / "copy", model=model)):
        one.update(handed, right(handed.samples))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "copy"))


def leaning(points: Tensor, by: float, count: int) -> Tensor:
    """Drawn again from these by weights exp(by x): their law tilted by a linear reward."""
    generator = torch.Generator().manual_seed(int(10 * by) % 7)
    return points[torch.multinomial((by * points[:, 0]).exp(), count, True, generator=generator)]


@pytest.mark.slow
def test_the_latest_data_are_followed(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", batch_size=128, kl_weight=1.0, learning_rate=0.02, value_steps=10, value_first_steps=40,
                value_batch_size=128, value_learning_rate=0.01, average=0.5)  # fmt: skip
    points = run.sample(count=2000, reference=True)
    how: dict[str, Any] = {"discriminator": {"features": "values", "samples": 300}, "window": 300}
    means, told = list[float](), list[float]()
    for by in (1.0, -1.0):
        latest = leaning(points, by, 400)
        told += [run.update(data=latest, **how).metrics["reward/auc"] for _ in range(3)]
        means.append(float(right(run.sample(count=1000)).mean()))
    middle = float(right(points).mean())
    assert means[0] - middle > 0.1
    assert middle - means[1] > 0.05
    assert told[3] > max(told[2], 0.7)  # the data had gone elsewhere
    assert told[5] < told[3] - 0.1
    # all that is remembered has the rewards of the newest data
    reward = sa.discriminate(run.policy().reference, latest, features="values", samples=300, steps=4)
    assert run._online is not None
    assert run._online._session is not None
    kept = Window.of(run._online._session.online)
    path, condition, _ = run._online._paths(list(kept.rewards), _batches(run), run._online._session.trainer)
    assert list(kept.rewards.values()) == pytest.approx(reward(path.xs[-1], condition).tolist(), abs=1e-5)


def _batches(run: SavedRun) -> dict[int, HandedPaths]:
    assert run._online is not None
    return {number: HandedPaths.of(path) for number, path in run._online._files().items()}


def test_data_that_are_no_stream_are_refused(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    handed, points = run.hand_out(count=40), torch.randn(100, 2)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "needs samples with their rewards, or data"),
        ({"samples": handed}, "needs samples with their rewards, or data"),
        ({"samples": handed, "rewards": [0.0] * 40, "data": points}, "and rewards too, which the data make"),
        (
            {"samples": handed, "rewards": [0.0] * 40, "discriminator": {"ridge": 1.0}},
            "options for data, and none are given",
        ),
        ({"data": points * float("nan")}, r"\(100, 2\) and hold NaN"),
        ({"data": torch.randn(100, 3)}, r"shape \(3,\), and the model draws \(2,\)"),
        ({"data": points[:20]}, "there are 18 examples to learn from"),
    ]
    for given, text in refused:
        with pytest.raises(SettingError, match=text):
            run.update(**given)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["full", "ridge"])
def test_a_pipeline_learns_online_by_its_own_default(decoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make("sd", spelling_tokenizer()).save_pretrained(tmp_path / "sd")
    words = (
        f"train {tmp_path / 'sd'} --reward outside --prompts red --out {tmp_path / 'run'} --steps 3 --batch-size 32 "
        f"--kl-states 16 --minibatch-size 32 --kl-weight 1e-5 --learning-rate 0.01 --surrogate-decoder {decoder}"
    )
    assert cli.main(words.split()) == 0
    run = sa.open_run(tmp_path / "run")
    assert (run.config.algorithm, run.config.value) == ("ctrl_pathwise", "surrogate")
    before = weights(tmp_path / "run")
    notes = list[str]()
    for _ in range(2):
        handed = run.hand_out(count=48)
        found = run.update(handed, handed.samples.mean((1, 2, 3)), window=64)
        notes += found.notes
    metrics = found.metrics
    assert metrics["surrogate/samples"] == 64
    if decoder == "full":
        assert metrics["surrogate/explained_variance"] > 0.5
    else:  # pictures of random weights are noise, of which a ridge decoder makes little, and says so
        assert 0 < metrics["surrogate/decoder"] < 0.9
        assert sum("the ridge decoder gives" in note for note in notes) == 1
    assert metrics["policy/step_kl"] <= 0.5
    assert not same(before, weights(tmp_path / "run"))


# --- files and commands --------------------------------------------------------------------------------------------------


def test_a_file_of_rewards_is_read_by_id_number_or_file(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"samples": [{"number": 0, "file": "00000.png", "id": 40}, {"number": 1, "id": 41}]}))

    def read(name: str, text: str, samples: Path | None = None) -> list[tuple[int, float | None]]:
        (tmp_path / name).write_text(text)
        return read_rewards(tmp_path / name, samples)

    assert read("a.csv", "id,reward\n7,0.5\n3,\n") == [(7, 0.5), (3, None)]
    assert read("a.tsv", "reward\tid\n0.5\t7\n") == [(7, 0.5)]
    assert read("a.jsonl", '{"id": 7, "reward": 1}\n\n{"id": 8, "reward": null}\n') == [(7, 1.0), (8, None)]
    assert read("b.csv", "file,reward\n00000.png,2\n", tmp_path) == [(40, 2.0)]
    assert read("c.csv", "number,reward\n1,2\n", index) == [(41, 2.0)]
    refused: list[tuple[str, str, Path | None, str]] = [
        ("d.csv", "id,score\n1,2\n", None, "has no column `reward`"),
        ("d.csv", "id,reward\n1,good\n", None, "line 2: the reward is 'good'"),
        ("d.csv", "id,reward\n-1,2\n", None, "line 2: the id is '-1'"),
        ("d.csv", "number,reward\n1,2\n", None, "names a number and no id; give the folder"),
        ("d.csv", "number,reward\n9,2\n", index, "has no sample whose number is '9'"),
        ("d.csv", "name,reward\n9,2\n", None, "names no sample"),
        ("d.jsonl", "3\n", None, "line 1 holds no object"),
    ]
    for name, text, samples, sentence in refused:
        with pytest.raises(FeedbackError, match=sentence):
            read(name, text, samples)
    index.write_text(json.dumps({"samples": [{"number": 0}]}))
    with pytest.raises(FeedbackError, match="knows no ids"):
        read("c.csv", "number,reward\n1,2\n", index)


def test_the_round_trip_without_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]

    def option(text: str) -> list[str]:
        return text.split()

    assert cli.main([*option("train gaussian --reward outside --out live --option width=16"), *words]) == 0
    assert "live waits for rewards" in capsys.readouterr().out
    assert cli.main(option("sample live --for-update --count 40")) == 0
    assert "ids 0 to 39" in capsys.readouterr().out
    folder = tmp_path / "live" / "samples" / "for-update"
    index = json.loads((folder / "index.json").read_text())
    assert [entry["id"] for entry in index["samples"]] == list(range(40))
    rows = "".join(f"{entry['number']},{entry['number'] / 40}\n" for entry in index["samples"])
    (tmp_path / "rewards.csv").write_text("number,reward\n" + rows)
    assert cli.main(option(f"update live --rewards rewards.csv --samples {folder} --window 64")) == 0
    printed = capsys.readouterr().out
    assert "40 new, 40 remembered" in printed
    assert "network calls; the policy moved by" in printed
    assert cli.main(option(f"update live --rewards rewards.csv --samples {folder}")) == 2
    assert "none of 40 rewards is new" in capsys.readouterr().err
    np.save(tmp_path / "latest.npy", torch.randn(200, 2).numpy())
    assert cli.main(option("update live --data latest.npy --count 32 --features values")) == 0
    printed = capsys.readouterr().out
    assert "32 new, 64 remembered" in printed
    assert "of held-out examples against the samples drawn now" in printed
    assert cli.main(option("update live")) == 2
    assert "give --rewards or --data" in capsys.readouterr().err
    assert cli.main(option("update live --rewards rewards.csv --count 3")) == 2
    assert "--count does nothing without --data" in capsys.readouterr().err
    assert cli.main(option("sample live --for-update --steps 3")) == 2
    assert "--steps does nothing with --for-update" in capsys.readouterr().err
    assert cli.main(option("sample live --count 2 --out drawn")) == 0  # the index is without rewards
    assert cli.main(option("evaluate live")) != 0
    assert "come from outside" in capsys.readouterr().err
