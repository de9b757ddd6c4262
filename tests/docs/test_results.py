"""The figures of the results pages that have machine-readable results beside them say the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, as a module; it imports what stands beside it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    return module


def test_a_table_is_put_between_its_marks_and_a_page_without_them_is_left_alone(tmp_path: Path) -> None:
    put, page, marks = benchmark("page_tables").put, tmp_path / "page.md", ("<!-- a -->\n", "<!-- /a -->\n")
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    put("| new |\n", page, marks)
    assert page.read_text() == "before\n<!-- a -->\n| new |\n<!-- /a -->\nafter\n"
    page.write_text("before\n<!-- a -->\nafter\n")
    with pytest.raises(SystemExit, match="put these two lines where it goes"):
        put("| new |\n", page, marks)
    assert page.read_text() == "before\n<!-- a -->\nafter\n"


def between(marks: tuple[str, str], page: str) -> str:
    """What a page of docs/ shows between two marks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(marks[0])[2].partition(marks[1])[0]


def measured(name: str) -> list[dict[str, Any]]:
    """The lines of a file of benchmarks/."""
    return [json.loads(line) for line in (ROOT / "benchmarks" / name).read_text(encoding="utf-8").splitlines()]


def test_the_arenas_table_is_that_of_its_results() -> None:
    module = benchmark("arena_page")
    shown = between(module.MARKS, "results/arena.md")
    assert shown == module.made(ROOT / "benchmarks" / "arena", ROOT / "benchmarks" / "arena-third")
    assert "| `ctrl` |" in shown


def test_the_arenas_table_of_the_pipeline_is_that_of_its_results() -> None:
    module = benchmark("arena_page")
    shown = between(module.PIPELINE_MARKS, "results/arena.md")
    assert shown == module.of_pipeline(ROOT / "benchmarks" / "arena-shapes")
    assert "| `ctrl_pathwise` |" in shown


def test_the_table_of_rams_bias_is_that_of_its_runs() -> None:
    module = benchmark("ram_bias")
    page = (ROOT / "docs" / "results" / "ram.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- ram-table -->\n")[2].partition("\n<!-- /ram-table -->")[0]
    assert shown == module.made(ROOT / "benchmarks" / "ram_bias.jsonl")
    assert shown.count("| mixture, quadratic |") == 6


def test_the_table_of_calibrations_is_that_of_its_runs() -> None:
    module = benchmark("calibrate")
    shown = between(module.MARKS, "howto/calibrate.md")
    assert shown == module.made(ROOT / "benchmarks" / "calibrate.jsonl")
    assert shown.count("| mean |") == 1


@pytest.mark.slow
def test_rams_fixed_point_is_the_optimum_of_a_gaussian_and_a_linear_reward() -> None:
    found = benchmark("ram_bias").known("Gaussian", "linear", 1.0)
    assert found["fixed"] == pytest.approx(1.0, abs=0.003)
    assert found["exact"] == pytest.approx(1.0, abs=0.005)
    assert found["J_grid"] <= found["J_star"]


@pytest.mark.parametrize("task", ["shapes", "counting"])
def test_the_tables_of_black_boxes_are_those_of_their_runs(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = benchmark("black_box")
    page = (ROOT / "docs" / "results" / "black-box.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {task} -->\n")[2].partition(f"\n<!-- /{task} -->")[0]
    assert shown == module.made(task, ROOT / "benchmarks" / f"black_box-{task}.jsonl")
    assert "`DDPOTrainer`" in shown


def test_the_table_of_calls_on_the_way_is_that_of_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("on_the_way")
    shown = between(module.MARKS, "results/black-box.md")
    assert shown == module.table(measured("on_the_way.jsonl"))
    assert shown.count("| on the way, where unsure |") == 3


def test_the_tables_of_rewards_from_outside_are_those_of_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "howto" / "online.md").read_text(encoding="utf-8")
    made = benchmark("online").made()
    assert len(made) == page.count("<!-- /online")
    for name, table in made.items():
        assert page.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0] == table
        assert table.count("\n") > 2


def test_the_tables_of_precision_are_those_of_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("precision")
    shown = between(module.MARKS, "howto/pipelines.md")
    assert shown == module.table(measured("precision.jsonl"))
    assert "| bfloat16, computed in float32 |" in shown


def test_the_table_of_the_control_variate_is_that_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("rwr_baseline")
    shown = between(module.MARKS, "reference/rules.md")
    assert shown == module.table(measured("rwr_baseline.jsonl"))
    assert shown.count("`denoised`") == 2


def test_the_table_of_cifar_is_that_of_its_pictures() -> None:
    module = benchmark("cifar")
    shown = between(module.MARKS, "results/gpu.md")
    assert shown == module.table(measured("cifar.jsonl"))
    assert shown.count("| am60 |") == 3


@pytest.mark.parametrize(("recipe", "steps"), [("four-steps", 4), ("two-steps", 2)])
def test_the_table_of_few_steps_is_that_of_its_runs(recipe: str, steps: int) -> None:
    module = benchmark("four_steps")
    shown = between(module.MARKS[recipe], "results/four-steps.md")
    lines = measured(f"{recipe.replace('-', '_')}.jsonl")
    assert shown == module.table(lines)
    assert f"| pretrained | ddim {steps} |" in shown


def test_the_tables_of_health_are_those_of_their_runs() -> None:
    module = benchmark("health")
    shown = between(module.MARKS, "results/health.md")
    assert shown == module.tables(module.lines(ROOT / "benchmarks" / "health.jsonl"))
    assert "| none | tuned to log p(class) |" in shown


def test_the_tables_of_anomalies_are_those_of_their_runs() -> None:
    for name in ("anomalies", "paradox"):
        module = benchmark(name)
        shown = between(module.MARKS, "results/anomalies.md")
        assert shown == module.table(measured(f"{name}.jsonl"))
        assert {"anomalies": "| PyOD AutoEncoder | 5 |", "paradox": "| a white square on black |"}[name] in shown


def test_the_tables_of_heartbeats_are_those_of_their_runs() -> None:
    module = benchmark("heartbeats")
    assert between(module.MARKS, "results/health.md") == module.table(measured("heartbeats.jsonl"))
    assert module.table(measured("heartbeats.jsonl")).count("| tuned to log p(class) |") == 2


def test_the_tables_of_few_steps_are_those_of_their_runs() -> None:
    module = benchmark("few_steps")
    shown = between(module.MARKS, "results/few-steps.md")
    lines = measured("few_steps.jsonl")
    assert shown == module.tables(lines) + "\n"
    assert "| 4 | dpm_solver_pp_2m |" in shown


def test_the_table_of_simulated_people_is_that_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    lines = measured("people.jsonl")
    made = importlib.import_module("people").table(lines)
    assert made in (ROOT / "docs" / "howto" / "liking.md").read_text(encoding="utf-8")
    assert made.count("text to image | 5 |") == 3


def test_the_tables_of_markets_are_those_of_their_runs() -> None:
    module = benchmark("markets")
    for name, lines in (("markets", "markets.jsonl"), ("indices", "markets_indices.jsonl")):
        start, end = (mark.replace("markets", name) for mark in module.MARKS)
        shown = between((start, end), "results/markets.md")
        assert shown == module.table(measured(lines))
        assert "| GARCH, each day anew |" in shown


def test_the_table_of_trained_scenarios_is_that_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = benchmark("market_scenarios")
    shown = between(module.MARKS, "results/markets.md")
    lines = measured("market_scenarios.jsonl")
    assert shown == module.table(lines)
    assert "| the same, at once | P, softly |" in shown


@pytest.mark.slow
def test_garchs_recursion_is_archs_and_its_windows_keep_what_was_fitted() -> None:
    module = benchmark("markets")
    rng = np.random.default_rng(0)
    returns = torch.from_numpy(0.01 * rng.standard_t(6, (2, 800)))
    for kind in ("GARCH", "EGARCH"):
        law = module.Garch(returns, kind)
        variance = np.stack(law.variance)  # [C, days], of arch
        for day in range(1, 800, 100):
            np.testing.assert_allclose(
                law.next(variance[:, day - 1], law.residuals[:, day - 1]), variance[:, day], rtol=1e-6
            )
        windows = law.windows(400, 0)
        assert windows.shape == (400, 2, 64)
        np.testing.assert_allclose(windows.transpose(0, 1).flatten(1).std(1), returns.std(1), rtol=0.1)


def test_the_table_of_video_is_that_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = benchmark("motion")
    shown = between(module.MARKS, "results/video.md")
    lines = measured("motion.jsonl")
    assert shown == module.table(lines) + "\n"
    assert "| draft, one-sided | temporal_flickering |" in shown


def test_the_judge_of_video_knows_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = benchmark("moving_shapes")
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(len(shapes.CAPTIONS)).repeat(8)
    prompts = [shapes.CAPTIONS[i] for i in classes]
    moving, still, shaking = (
        shapes.judged(shapes.draw(classes, generator, *shares), prompts) for shares in ((0, 0), (1, 0), (0, 1))
    )
    for found, good, moves in ((moving, 1.0, 1.0), (still, 0.0, 0.0), (shaking, 0.0, 1.0)):
        assert float(found["identity"].float().mean()) == 1
        assert float(found["good"].float().mean()) == pytest.approx(good, abs=0.1)
        assert float(found["moves"].float().mean()) == pytest.approx(moves, abs=0.05)
    assert bool(moving["direction"].all())
    assert float((moving["speed"] - 1.05).abs().max()) < 0.3  # drawn from 0.8 to 1.3 pixels a frame
    wrong = shapes.judged(shapes.draw(classes, generator), [shapes.CAPTIONS[(i + 4) % 8] for i in classes])
    assert not wrong["identity"].any()  # of another colour


def test_the_table_of_words_is_that_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("words")
    shown = between(module.MARKS, "results/words.md")
    lines = module.Lines(ROOT / "benchmarks" / "words.jsonl", None)
    assert shown == module.summary(lines) + "\n"
    assert "`ctrl_pathwise --value surrogate`" in shown
