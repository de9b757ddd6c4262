"""Numbers that fail once: a run goes back to its last good state and on with smaller steps, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.mlp import MLP
from scoreact.models.network import NetworkModel
from scoreact.recipes.gaussian import build
from scoreact.report.words import what_happened
from scoreact.rewards import Linear
from scoreact.runs.record import read_record
from scoreact.support.errors import Diverged, SettingError
from scoreact.support.files import read_lines
from scoreact.training.loop import Hook, check_finite
from scoreact.training.trainer import Trainer

SMALL: dict[str, Any] = {
    "iterations": 6, "batch_size": 16, "steps": 3, "heldout_samples": 16, "reference_batches": 1, "device": "cpu",
    "solver": "euler_maruyama", "value_steps": 2, "value_first_steps": 2, "evaluate_every": 2, "checkpoint_every": 2,
    "warmup": 0, "decay_from": 1.0,
}  # fmt: skip


class Breaks(Hook):
    """Weights that become NaN before some iterations."""

    def __init__(self, *at: int) -> None:
        self.at = list(at)

    def before(self, trainer: Trainer) -> None:
        if trainer.iteration in self.at:
            self.at.remove(trainer.iteration)
            with torch.no_grad():
                trainer.policy.trainable()[-1].fill_(torch.nan)


def train(out: Path | None, *at: int, **settings: Any) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = build(width=8)
    return finetune(problem, out=out, hooks=[Breaks(*at)], progress=False, **{**SMALL, **settings})


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(("at", "back"), [(3, 2), (4, 2), (0, 0)])
def test_a_run_goes_back_once_and_on_with_smaller_steps(folder: bool, at: int, back: int, tmp_path: Path) -> None:
    out = tmp_path / "run" if folder else None
    result = train(out, at)
    (said,) = [line for line in result.history if line.get("guard") == "rollback"]
    assert said["iteration"] == back
    assert f"numbers failed after iteration {at} (samples for reward" in said["text"]
    assert f"went back to iteration {back} and goes on with 0.25 of every step" in said["text"]
    rates = {line["iteration"]: line["learning_rate"] for line in result.history if "learning_rate" in line}
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    assert all(rate == pytest.approx(2e-3 * (1.0 if n <= back else 0.25)) for n, rate in rates.items())
    assert all(bool(p.isfinite().all()) for p in result.policy.parameters())
    if out is not None:
        assert read_lines(out / "metrics.jsonl") == result.history
        assert any("went back to iteration" in text for text in what_happened(read_record(out)))


@pytest.mark.parametrize("folder", [True, False])
def test_what_it_goes_back_to_is_that_state_exactly(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps as before, the accident leaves no trace in the weights."""
    monkeypatch.setattr("scoreact.runs.rollback.SLOWER", 1.0)
    whole, broken = train(None), train(tmp_path / "run" if folder else None, 3)
    assert "rollback" in [line.get("guard") for line in broken.history]
    for one, other in zip(whole.policy.parameters(), broken.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_time_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contain NaN"):
        train(tmp_path / "run", 3, 4)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines if line.get("guard") == "rollback"] == [2]


def test_a_limit_that_is_passed_is_such_a_number() -> None:
    with pytest.raises(Diverged, match="over kl_limit"):
        train(None, kl_limit=1e-9)


def test_an_evaluation_that_is_no_number_is_noticed() -> None:
    assert check_finite({"objective/J": 1.0}, 3) == {"objective/J": 1.0}
    with pytest.raises(Diverged, match="policy/kl of held-out samples is nan at iteration 3"):
        check_finite({"policy/kl": float("nan")}, 3)


# --- what can give no numbers is refused ------------------------------------------------------------------------------------


def flow(**ends: float) -> NetworkModel:
    return NetworkModel(MLP(2, 2, 8), RectifiedFlow(**ends), prediction.velocity, (2,))


def learn(model: NetworkModel, **settings: Any) -> Result:
    few = {k: v for k, v in SMALL.items() if settings["algorithm"] == "ctrl" or not k.startswith("value")}
    return finetune(model, Linear([1.0, 0.0]), progress=False, **{**few, "iterations": 1, **settings})


def test_a_noisy_step_to_where_no_score_is() -> None:
    with pytest.raises(
        SettingError, match=r"euler_maruyama with RectifiedFlow: the last step.*sigma is 0.*solver ddim"
    ):
        learn(flow(), algorithm="ctrl")
    for model, settings in (
        (flow(t_max=0.999), {}), (flow(), {"solver": "ddim"}), (flow(), {"gradient_at": "state"}), (flow(), {"act_until": 0.5}),
    ):  # fmt: skip
        assert torch.isfinite(torch.tensor(learn(model, algorithm="ctrl", **settings).final["objective/J"]))
    learn(flow(), algorithm="ddpo")  # asks for no score there


@pytest.mark.parametrize("solver", ["ddim", "euler_maruyama"])
def test_a_path_that_begins_where_alpha_is_0(solver: str) -> None:
    with pytest.raises(SettingError, match=r"no finite step from t = 0 to 0.333, where alpha is 0 and sigma 1"):
        learn(flow(t_min=0.0), algorithm="ddpo", solver=solver)
