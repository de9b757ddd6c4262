"""Which path draws the data's spread: against the recursion of the variance, and what a learned model is drawn by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import scoreact as sa
from scoreact.api.saved_run import SavedRun
from scoreact.api.start import usual_config
from scoreact.dynamics.grids import grid_times
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.own_model import own_recipe, read_about, read_model
from scoreact.runs.source import open_source
from scoreact.sampling.spread import PATHS, measured_paths, nearest_path, spread_of


def variance(path: dict, data: float) -> float:
    """Of samples of N(0, data) that a path draws with the exact score: a step multiplies it and adds the noise's."""
    schedule = RectifiedFlow()
    sde, found = SDE(schedule, noise_level(1.0)), 1.0
    times, one = grid_times(path["grid"], schedule, path["steps"]).double(), torch.ones(1, 1, dtype=torch.float64)
    for t0, t1 in zip(times[:-1, None], times[1:, None], strict=True):
        score = -1 / (schedule.alpha(t0) ** 2 * data + schedule.sigma(t0) ** 2)
        step = SOLVERS[path["solver"]](sde, lambda t, x, s=score: s * x, t0, t1, one)
        found = float(step.mean[0, 0] ** 2 * found + step.std[0] ** 2)
    return found


def gaussian(data: float, dim: int = 8) -> GaussianMixture:
    return GaussianMixture(RectifiedFlow(), torch.ones(1), torch.zeros(1, dim), data * torch.eye(dim)[None])


def test_paths_are_measured_up_to_the_first_that_draws_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    for data, first in ((1.0, 1), (0.25, 2)):
        states = data**0.5 * torch.randn(20_000, 8, generator=generator)
        tried = measured_paths(gaussian(data), states)
        for path in tried:
            assert path["spread"] == pytest.approx((variance(path, data) / data) ** 0.5, rel=0.04)
        assert nearest_path(tried) == tried[first]
        assert len(tried) == first + 1
    assert variance(PATHS[0], 1.0) ** 0.5 == pytest.approx(0.805, abs=0.001)


def test_a_path_that_breaks_down_is_not_taken() -> None:
    assert nearest_path([{"spread": float("nan")}, {"spread": 0.6}])["spread"] == 0.6


def test_the_spread_is_that_within_classes() -> None:
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    labels = torch.arange(4000) % 2
    apart = rows + 10 * labels[:, None]
    assert spread_of(apart, labels) == pytest.approx((14 / 3) ** 0.5, rel=0.03)
    assert spread_of(apart) > 5


def test_a_learned_model_is_drawn_by_the_path_that_was_measured(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(400, 2))
    (tmp_path / "own.csv").write_text("a,b\n" + "\n".join(f"{a},{b}" for a, b in points))
    told: dict[str, dict] = {}
    quick = {"width": 8, "batch_size": 16, "bfloat16": "no", "progress": False}
    model = sa.pretrain(
        tmp_path / "mine", tmp_path / "own.csv", steps=100, on_event=lambda kind, line: told.update({kind: dict(line)}), **quick
    )  # fmt: skip
    path = read_about(tmp_path / "mine")["path"]
    assert told["path"]["solver"] == "euler_maruyama"
    assert {"tried": told["path"]["tried"], **path} == told["path"]
    wanted = {name: path[name] for name in PATHS[0]}
    for config in (
        own_recipe(tmp_path / "mine").config,
        usual_config(model),
        usual_config(read_model(tmp_path / "mine")),
    ):
        assert {name: getattr(config, name) for name in wanted} == wanted
    sa.pretrain(tmp_path / "new", tmp_path / "own.csv", steps=2, **quick)  # nothing is learned that could be measured
    assert own_recipe(tmp_path / "new").config.steps == PATHS[-1]["steps"]


@pytest.mark.slow
def test_a_gaussian_series_is_drawn_with_its_standard_deviation(tmp_path: Path) -> None:
    z = np.random.default_rng(0).normal(size=(4000, 2, 16))
    for k in range(1, 16):
        z[..., k] = 0.5 * z[..., k - 1] + 0.75**0.5 * z[..., k]
    np.save(tmp_path / "own.npy", (z * [[[3.0], [0.5]]]).astype(np.float32))
    sa.pretrain(
        tmp_path / "mine", tmp_path / "own.npy", kind="series", steps=300, width=8, batch_size=64, bfloat16="no",
        progress=False,
    )  # fmt: skip
    samples = SavedRun(open_source(str(tmp_path / "mine"))).sample(count=1000)
    torch.testing.assert_close(samples.std((0, 2)), torch.tensor([3.0, 0.5]), rtol=0.06, atol=0.0)
