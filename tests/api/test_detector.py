"""The detector inside PyOD's and scikit-learn's tools, and `score` of models, recipes, runs and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import scoreact as sa
from scoreact.cli.main import main
from scoreact.control.policy import Policy
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import VP
from scoreact.evaluation.anomaly_scores import METHODS, NEED_NORMAL
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.unet import UNet
from scoreact.recipes.gaussian import build, mixture
from scoreact.support.errors import SettingError

LAW = mixture(2, 4, 0)
QUICK: dict[str, Any] = {"levels": 4, "noises": 2}


def data(normal: int = 60, odd: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Points of the mixture, and some far from it: 1 in the second array."""
    points = LAW.sample(normal + odd, torch.Generator().manual_seed(2))
    points[normal:] = 5 * points[normal:] + 6
    return points.numpy(), np.repeat([0, 1], [normal, odd])


@pytest.mark.filterwarnings("ignore")  # of these libraries' own making
def test_inside_pyods_tools() -> None:
    pytest.importorskip("pyod")
    from pyod.models.iforest import IForest
    from pyod.models.lscp import LSCP
    from pyod.utils.data import get_outliers_inliers
    from pyod.utils.utility import precision_n_scores

    points, truth = data()
    ours, theirs = sa.DiffusionDetector(LAW, contamination=0.1, **QUICK), IForest(contamination=0.1, random_state=0)
    for detector in (ours, theirs):
        detector.fit(points)
    assert ours.decision_scores_.shape == theirs.decision_scores_.shape == (66,)
    assert ours.labels_.sum() == theirs.labels_.sum() == 7
    assert ours.threshold_ == pytest.approx(np.percentile(ours.decision_scores_, 90))
    assert precision_n_scores(truth, ours.decision_scores_) == 1.0
    assert len(get_outliers_inliers(points, ours.labels_)[0]) == 7
    both = LSCP([sa.DiffusionDetector(LAW, **QUICK), IForest(random_state=0)], random_state=0).fit(points)
    assert both.decision_function(points[-6:]).mean() > both.decision_function(points[:6]).mean()
    for method in ("linear", "unify"):
        mine, known = (d.predict_proba(points, method=method) for d in (ours, theirs))
        assert mine.shape == known.shape == (66, 2)
        assert np.allclose(mine.sum(1), 1)
        assert mine[truth == 1, 1].mean() > 0.5 > mine[truth == 0, 1].mean()


@pytest.mark.filterwarnings("ignore")
def test_inside_scikit_learns_tools() -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_outlier_detector
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    points, truth = data()
    detector = sa.DiffusionDetector(LAW, seed=3, **QUICK)
    again = clone(detector)
    assert again is not detector
    assert {k: v for k, v in again.get_params().items() if k != "model"} == {
        k: v for k, v in detector.get_params().items() if k != "model"
    }
    assert is_outlier_detector(detector)
    line = make_pipeline(
        FunctionTransformer(lambda x: x / 10, lambda x: 10 * x), FunctionTransformer(lambda x: 10 * x), detector
    )
    assert np.allclose(line.fit(points).decision_function(points), detector.fit(points).decision_scores_, atol=1e-4)
    search = GridSearchCV(
        sa.DiffusionDetector(LAW, noises=2),
        {"levels": [2, 4]},
        scoring="roc_auc",
        cv=StratifiedKFold(2),
        error_score="raise",
    )
    assert search.fit(points, truth).best_score_ > 0.95


def test_what_the_detector_keeps_and_refuses() -> None:
    points, _ = data(20, 0)
    detector = sa.DiffusionDetector(LAW, **QUICK)
    with pytest.raises(SettingError, match="not fitted"):
        detector.decision_function(points)
    assert (
        detector.fit_predict(points).tolist() == (detector.decision_scores_ > detector.threshold_).astype(int).tolist()
    )
    assert np.array_equal(detector.predict(points), detector.labels_)
    with pytest.raises(SettingError, match=r"contamination is 0\.7"):
        detector.set_params(contamination=0.7).fit(points)
    with pytest.raises(SettingError, match="unknown parameter 'level'"):
        detector.set_params(level=3)
    with pytest.raises(SettingError, match="the model draws"):
        sa.score(LAW, np.zeros((4, 3)))
    with pytest.raises(SettingError, match="NaN"):
        sa.score(LAW, np.full((4, 2), np.nan))
    with pytest.raises(SettingError, match="typicality compares with normal samples"):
        sa.score(LAW, points, "typicality")
    with pytest.raises(SettingError, match="makes no use of normal samples"):
        sa.score(LAW, points, "path", normal=points)


def test_the_bits_of_points_are_their_density() -> None:
    points, _ = data(10, 0)
    exact = LAW.log_prob(torch.full((10,), LAW.schedule.t_max), torch.from_numpy(points))
    found = sa.score(LAW, points, "bits", tolerance=1e-5)
    assert np.allclose(found, -exact.numpy() / (2 * np.log(2)), atol=1e-3)


def test_a_slow_trace_is_said_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scoreact.evaluation.likelihood.LONG", 0.0)
    points, _ = data(3, 0)
    with pytest.warns(UserWarning, match="2 gradients a call: about .* for 3 rows.* probes=8"):
        sa.score(LAW, points, "bits", tolerance=0.1)
    np.save(tmp_path / "points.npy", points)
    words = ["score", "gaussian", "--data", str(tmp_path / "points.npy"), "--method", "bits", "--tolerance", "0.1"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.startswith("note: the exact trace of 2 numbers")
    assert "note" not in said.out


def test_pictures_are_scored_by_every_method_and_class() -> None:
    torch.manual_seed(0)
    model = sa.NetworkModel(
        UNet(widths=(8, 8), classes=2), VP(), prediction.v, (1, 8, 8), ["disc", "square"],
        low=-1, high=1,
    )  # fmt: skip
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    how: dict[str, Any] = {"levels": 2, "noises": 1}
    with pytest.raises(SettingError, match="classes disc, square"):
        sa.score(model, pictures)
    policy = Policy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for method in METHODS:
        more = {"normal": pictures} if method in NEED_NORMAL else {}
        rest = {"probes": 2, "tolerance": 1.0} if method == "bits" else how
        of = policy if method == "ratio" else model
        found = sa.score(of, pictures, method, prompts="disc", **rest, **more)
        assert found.shape == (20,)
        assert np.isfinite(found).all()
        if method in ("path", "ratio"):
            assert np.array_equal(
                found, sa.score(of, pictures.reshape(20, 64) / 255, method, prompts=["0"] * 20, **how)
            )
    change = [sa.score(m, pictures, "path", prompts="disc", **how) for m in (model, policy.reference)]
    ratio = sa.score(policy, pictures, "ratio", prompts="disc", **how)
    assert np.allclose(ratio, (change[0] - change[1]) * 64 * np.log(2), rtol=1e-3)


def test_the_command_on_a_recipe_and_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, _ = data(8, 0)
    np.save(tmp_path / "points.npy", points)
    few = ["--levels", "2", "--seed", "1"]
    assert main(["score", "gaussian", "--data", str(tmp_path / "points.npy"), *few]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    wanted = sa.score("gaussian", points, levels=2, seed=1)
    assert np.allclose([float(row["path"]) for row in rows], wanted, rtol=1e-6)
    run = tmp_path / "run"
    words = "train gaussian --iterations 2 --batch-size 16 --reference-batches 1 --heldout-samples 16 --steps 4 --device cpu"
    assert main([*words.split(), "--out", str(run)]) == 0
    out = tmp_path / "scores.jsonl"
    assert (
        main(["score", str(run), "--data", str(tmp_path / "points.npy"), "--method", "ratio", "--out", str(out), *few])
        == 0
    )
    assert f"where {run} is less likely to draw it than what it was tuned from" in capsys.readouterr().err
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(8))
    problem = build()
    opened = sa.open_run(run, problem.model, problem.reward)
    assert np.allclose([x["ratio"] for x in lines], sa.score(opened, points, "ratio", levels=2, seed=1), atol=1e-5)
    assert any(x["ratio"] != 0 for x in lines)
    assert main(["score", str(run), "--data", str(tmp_path / "points.npy"), "--method", "bits", "--out", str(out)]) == 0
    assert json.loads(out.read_text().splitlines()[0])["standard_error"] == 0
    assert main(["score", "gaussian", "--data", str(tmp_path / "points.npy"), "--method", "ratio", *few]) == 2
    assert "give a run, or a reference" in capsys.readouterr().err
    assert main(["score", "gaussian", "--data", str(tmp_path / "points.npy"), "--probes", "4"]) == 2
    assert "--probes does nothing without --method bits" in capsys.readouterr().err


def test_files_are_read_row_by_row(tmp_path: Path) -> None:
    from scoreact.support.own_data import read_rows

    (tmp_path / "t.csv").write_text("a,b,label\n1,2,x\n3,4,y\n1,2,x\n")
    found = read_rows(tmp_path / "t.csv", (2,), True)
    assert found.values.tolist() == [[1, 2], [3, 4], [1, 2]]
    assert found.labels == ["x", "y", "x"]
    pictures = np.full((5, 6, 6), 7, np.uint8)
    np.savez(
        tmp_path / "p.npz",
        train_images=pictures,
        test_images=pictures[:2] + 9,
        train_labels=range(5),
        test_labels=[3, 4],
    )
    held = read_rows(tmp_path / "p.npz", (1, 6, 6), True)
    assert held.values.shape == (2, 1, 6, 6)
    assert held.labels == ["3", "4"]
    assert held.notes == ("Scored are 2 held-out examples. Held out are those of test_images.",)
    assert len(read_rows(tmp_path / "p.npz", (1, 6, 6), part="train").values) == 5
    with pytest.raises(SettingError, match=r"\(1, 6, 6\); the model draws \(1, 8, 8\)"):
        read_rows(tmp_path / "p.npz", (1, 8, 8))


def test_a_model_of_pretrain_encodes_its_own_unit() -> None:
    """Vectors and series are scored in the data's unit."""
    from scoreact.recipes.own_model import ScaledModel

    law = GaussianMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])

    class Known(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return law.score(t, x)

    model = ScaledModel(
        Known(), VP(), prediction.score, (2,), mean=torch.tensor([5.0, 1.0]), spread=torch.tensor([3.0, 0.1])
    )
    x = torch.tensor([[5.0, 1.0], [8.0, 1.2]])
    wanted = torch.distributions.Normal(torch.tensor([5.0, 1.0]), torch.tensor([3.0, 0.1])).log_prob(x).sum(1)
    found = sa.score(model, x, "bits", tolerance=1e-5)
    assert np.allclose(
        found, -wanted.numpy() / (2 * np.log(2)), atol=1e-2
    )  # its prior is normal noise, at alpha = 0.007
