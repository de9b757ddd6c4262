"""Rewards in a folder: what was stored is what is loaded, from anywhere, and damage is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreact.rewards import load
from scoreact.rewards.learned import LearnedReward, open_learned, save_learned
from scoreact.rewards.sample_features import open_features
from scoreact.runs.resuming import named_files
from scoreact.types import Condition

CLASSES = ("shirt", "shoe")


def reward(**changes: Any) -> LearnedReward:
    g = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {
        "features": open_features("pixels", (1, 8, 8)), "mean": torch.rand(32, generator=g),
        "weight": torch.randn(2, 32, generator=g), "bias": torch.tensor([0.5, -1.0]), "classes": CLASSES, "clip": 4.0,
        "real": torch.randn(50, generator=g), "facts": {"auc": 0.9},
    }  # fmt: skip
    return LearnedReward(**{**given, **changes})


def pictures(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(4))


MIXED = Condition(["shoe", "shirt", "shirt", "shoe", "shirt", "shoe"])


def test_it_is_the_clipped_logit_of_its_own_class() -> None:
    r, x = reward(), pictures()
    z = open_features("pixels", (1, 8, 8))(x) - r.mean
    for i, prompt in enumerate(MIXED.prompts):
        k = CLASSES.index(prompt)
        logit = float(z[i] @ r.weight[k] + r.bias[k])
        assert float(r(x, MIXED)[i]) == pytest.approx(4 * float(torch.tanh(torch.tensor(logit / 4))), abs=1e-5)
    assert float(r(1e4 * x, MIXED).abs().max()) <= 4
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(r(x, MIXED).sum(), x)
    assert bool(gradient.any())
    one = reward(weight=torch.randn(1, 32), bias=torch.zeros(1), classes=())
    assert torch.equal(one(x, MIXED), one(x, Condition(["anything"] * 6)))
    with pytest.raises(ValueError, match="reward learned: prompt 'hat' is none of the reward's classes"):
        r(x[:1], Condition(["hat"]))


def test_a_folder_gives_the_same_reward_from_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_learned(reward(), tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    by_name, by_path = load("real"), load(str(tmp_path / "real"))
    for found in (by_name, by_path):
        assert isinstance(found, LearnedReward)
        assert torch.equal(found(pictures(), MIXED), reward()(pictures(), MIXED))
        assert found.name == "real"
        assert found.facts == {"auc": 0.9}
        assert found.real is not None
        assert torch.equal(found.real, torch.as_tensor(reward().real))
    with pytest.raises(FileExistsError, match="never written over another"):
        save_learned(reward(), tmp_path / "real")
    with pytest.raises(ValueError, match="no option 'clip'"):
        load("real", clip=3.0)


def test_a_sum_is_the_reward_of_the_summed_logits() -> None:
    one, x = reward(clip=1e6), pictures()
    other = reward(mean=torch.zeros(32), weight=torch.randn(2, 32), bias=torch.tensor([0.1, 0.2]), clip=1e6)
    both = one.plus(other)
    torch.testing.assert_close(both(x, MIXED), one(x, MIXED) + other(x, MIXED), rtol=1e-4, atol=1e-4)
    assert both.real is None
    with pytest.raises(ValueError, match="see other features"):
        one.plus(reward(features=open_features("values", (1, 8, 8))))
    with pytest.raises(ValueError, match="are of other classes"):
        one.plus(reward(classes=("shoe", "shirt")))


def test_damage_is_told_in_a_sentence(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        save_learned(reward(), tmp_path / name)
        return tmp_path / name

    def edited(name: str, **changes: Any) -> Path:
        folder = fresh(name)
        about = json.loads((folder / "reward.json").read_text())
        (folder / "reward.json").write_text(json.dumps({**about, **changes}))
        return folder

    (tmp_path / "empty").mkdir()
    cut = fresh("cut")
    (cut / "reward.safetensors").write_bytes((cut / "reward.safetensors").read_bytes()[:-9])
    gone = fresh("gone")
    (gone / "reward.safetensors").unlink()
    text = fresh("text")
    (text / "reward.json").write_text("{")
    other = fresh("other")
    save_learned(reward(clip=2.0, bias=torch.zeros(2)), tmp_path / "second")
    (other / "reward.json").write_text((tmp_path / "second" / "reward.json").read_text())
    for folder, said in {
        tmp_path / "empty": "holds no reward.json, so it is no reward",
        cut: "is not a complete safetensors file",
        gone: "reward.safetensors does not exist",
        text: "reward.json is no JSON",
        other: "are not of one reward",
        edited("newer", form="deep"): "is of the form 'deep'; this version knows ",
        edited("list", features=[]): "is damaged (TypeError",
        edited("without", features={"spec": "pixels"}): "is damaged (KeyError",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            open_learned(folder)
    with pytest.raises(ValueError, match=r"or a folder of `scoreact reward`"):
        load("reel")


def test_a_run_depends_on_what_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_learned(reward(), tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert {Path(file).name for file in named_files({"reward": "real"})} == {"reward.json", "reward.safetensors"}
    assert named_files({"reward": ""}) == {}
