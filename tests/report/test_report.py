"""The report against the folder it is made from: its numbers, its words, what is missing, and what is hostile."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.dynamics.schedule import VP
from scoreact.recipes import gaussian as gaussian_recipe
from scoreact.recipes.base import Problem
from scoreact.report import figures
from scoreact.report import html as report
from scoreact.report.figures import CURVES, cost_figure, curve_figure, gallery
from scoreact.report.numbers import aligned, duration, number
from scoreact.report.pictures import before_and_after
from scoreact.report.progress import reference_lines
from scoreact.report.words import headline, warnings
from scoreact.runs.record import Lines, read_record
from scoreact.support import files as checkpoint
from scoreact.training.config import Config
from scoreact.types import Condition

CONFIG = Config(kl_weight=0.5, solver="euler_maruyama", iterations=20, steps=4)
REFERENCE = {
    "iteration": 0, "reference": True, "objective/J_ref": -2.1234, "objective/J_ref_se": 0.02, "objective/J_star": 0.5,
    "objective/J_star_low": 0.4, "objective/J_star_high": 0.6, "objective/effective_samples": 321.0,
    "objective/trusted": 1.0,
}  # fmt: skip


def evaluation(iteration: int, reward: float, kl: float, **more: Any) -> dict[str, Any]:
    """An evaluation line."""
    j = reward - 0.5 * kl
    return {
        "iteration": iteration, "evaluation": True, "reward/heldout": reward, "reward/heldout_se": 0.05,
        "policy/kl": kl, "policy/kl_se": 0.01, "objective/J": j, "objective/J_se": 0.05,
        "objective/recovered": (j + 2.1234) / 2.6234, "sample/diversity": 2.5, "judge/frechet": 34.56 - iteration,
        **more,
    }  # fmt: skip


def iteration(index: int, reward: float, **more: Any) -> dict[str, Any]:
    """An iteration line."""
    return {
        "iteration": index, "seconds": 1.5 * index, "reward/mean": reward, "policy/kl": 0.04 * index,
        "value/explained_variance": 0.5, "cost/network_calls": 1000 * index, "cost/reward_calls": 123 * index, **more,
    }  # fmt: skip


def rising() -> list[dict[str, Any]]:
    """A run of 20 iterations that goes well."""
    first = [REFERENCE, evaluation(0, -2.0, 0.0)]
    middle = [iteration(i, -2.0 + 0.08 * i) for i in range(1, 21)]
    return [*first, *middle[:10], evaluation(10, -1.2, 0.5), *middle[10:], evaluation(20, -0.4321, 0.8768)]


def folder(
    path: Path,
    lines: Sequence[dict[str, Any]],
    problem: Problem | None = None,
    description: dict[str, Any] | None = None,
    stopped: str | None = None,
    finished: bool = True,
) -> Path:
    """A run folder as the trainer writes it; with a problem, also weights that differ from the model's."""
    path.mkdir(exist_ok=True)
    start = {"description": description or {}, "config": CONFIG.to_dict(), "versions": {"torch": "9.8.7"}}
    checkpoint.write_json(path / "config.json", start)
    for line in lines:
        checkpoint.append_line(path / "metrics.jsonl", line)
    if finished:
        checkpoint.write_json(path / "result.json", {"final": lines[-1], "stopped": stopped, "seconds": 75.0})
    if problem is not None:
        named = [(n, p) for n, p in problem.model.named_parameters() if p.requires_grad]  # type: ignore[attr-defined]
        checkpoint.write_tensors(path / "model.safetensors", {n: p + 0.01 for n, p in named})
    return path


def gaussian(**options: Any) -> Problem:
    return gaussian_recipe.build(width=8, **options)


ROW = {
    "solver": "ddim",
    "steps": 5,
    "reward": 1.0,
    "reward_se": 0.1,
    "reference_reward": 0.0,
    "reference_reward_se": 0.1,
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No curves and a made-up transfer table; the list grows by one when the table is computed."""
    calls: list[int] = []
    monkeypatch.setattr(report, "CURVES", ())
    monkeypatch.setattr(report, "transfer_table", lambda *a, **k: calls.append(1) or [ROW])
    return calls


def text_of(page: str) -> str:
    """The page without its pictures."""
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", page)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the page of a run that went well."""
    path = folder(
        tmp_path_factory.mktemp("run"),
        rising(),
        gaussian(),
        {"recipe": "gaussian", "command": "scoreact train gaussian"},
    )
    return path, report.write(path, gaussian()).read_text(encoding="utf-8")


# --- the page against the folder --------------------------------------------------------------------------------------


def test_the_headline_holds_the_folders_numbers(made: tuple[Path, str]) -> None:
    sentence = re.search('<p class="headline">(.*?)</p>', made[1])
    assert sentence is not None
    found = [float(x) for x in re.findall(r"-?\d+\.?\d*", sentence[1])]
    recovered = (-0.4321 - 0.5 * 0.8768 + 2.1234) / 2.6234
    expected = [-2.0, -0.4321, 95, -0.4321 - 1.96 * 0.05, -0.4321 + 1.96 * 0.05, 0.8768, 100 * recovered]
    assert found == pytest.approx(expected, rel=0.008)
    assert "rose from" in sentence[1]


def test_tables_hold_the_folders_numbers(made: tuple[Path, str]) -> None:
    path, page = made
    cells = [re.findall("<t[dh].*?>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    kept = json.loads((path / "transfer.json").read_text(encoding="utf-8"))["rows"]
    assert len(kept) >= 6
    keys = ("steps", "reference_reward", "reference_reward_se", "reward", "reward_se", "gain", "gain_se")
    for row in kept:
        line = next(c for c in cells if c[:2] == [row["solver"], str(row["steps"])])
        largest = max(abs(r["reward"]) for r in kept)
        assert [float(x) for x in line[1:]] == pytest.approx([row[key] for key in keys], abs=0.005 * largest)
    assert ["frechet", "34.6", "14.6"] in cells
    assert ["measure", "iteration 0", "iteration 20"] in cells
    settings = {c[0]: c[1].removesuffix(" *") for c in cells if len(c) == 3}
    content = CONFIG.to_dict()
    rule = content.pop("rule")
    for name, setting in {**content, **rule}.items():
        assert settings[name] == str(setting)
    assert ["torch", "9.8.7"] in cells


def test_cards_hold_the_folders_numbers(made: tuple[Path, str]) -> None:
    cards = dict(re.findall("<div><span>(.*?)</span><b>(.*?)</b></div>", made[1]))
    assert cards["held-out reward"] == "-2.00 → -0.432"
    assert cards["objective J"] == "-2.00 → -0.871"
    assert cards["possible: J_ref → J*"] == "-2.12 → 0.500"
    assert cards["path KL (nats)"] == "0.877"
    assert cards["reward calls"] == "2,460"
    assert cards["training time"] == "1 min 15 s"
    assert cards["iterations"] == "20 of 20"


def test_pictures_are_embedded_and_lie_beside_the_page(made: tuple[Path, str]) -> None:
    path, page = made
    embedded = [base64.b64decode(x) for x in re.findall('src="data:image/png;base64,(.*?)"', page)]
    names = {"reward", "objective", "kl", "diversity", "value", "costs", "samples"}
    assert {file.stem for file in path.glob("*.png")} == names
    assert {file.read_bytes() for file in path.glob("*.png")} == set(embedded)
    assert len(re.findall('alt="[A-Z]', page)) == len(names)


def test_the_page_is_self_contained_and_says_how_to_repeat_the_run(made: tuple[Path, str]) -> None:
    path, page = made
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page
    assert "scoreact train gaussian\n" in page
    for verb in ("resume", "sample", "evaluate", "report"):
        assert f"scoreact {verb} {path}" in page
    assert (
        page.index("headline") < page.index("Before and after") < page.index("Training</h2>") < page.index("settings")
    )


def test_a_run_of_the_trainer_is_reported(tmp_path: Path) -> None:
    problem = gaussian()
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=CONFIG,
        out=tmp_path / "run", optimum=problem.optimum, device="cpu", iterations=2, batch_size=64, value_steps=2,
        value_first_steps=2, heldout_samples=64, evaluate_every=1, checkpoint_every=2,
    )  # fmt: skip
    page = report.write(tmp_path / "run", problem, result.policy).read_text(encoding="utf-8")
    cards = dict(re.findall("<div><span>(.*?)</span><b>(.*?)</b></div>", page))
    first = next(line for line in result.history if "evaluation" in line)
    expected = [first["objective/J"], result.final["objective/J"]]
    assert [float(x) for x in cards["objective J"].split(" → ")] == pytest.approx(expected, rel=0.006)
    assert "before and after from the same noise" in page
    assert float(cards["possible: J_ref → J*"].split(" → ")[1]) == pytest.approx(problem.optimum(0.5), rel=0.006)  # type: ignore[misc]
    assert 'class="note"' not in page
    anew = report.write(tmp_path / "run", gaussian()).read_text(encoding="utf-8")  # from the folder alone
    assert text_of(anew) == text_of(page)
    pictures = (re.findall('base64,(.*?)"', x)[0] for x in (page, anew))
    assert next(pictures) == next(pictures)


# --- words ------------------------------------------------------------------------------------------------------------


def changed(lines: Sequence[dict[str, Any]], index: int, **changes: Any) -> list[dict[str, Any]]:
    """The lines with some metrics of one of them changed; `a_b` in a keyword stands for `a/b`."""
    found = list(lines)
    found[index] = {**found[index], **{key.replace("_", "/", 1): x for key, x in changes.items()}}
    return found


def test_the_headline_says_what_happened(tmp_path: Path) -> None:
    cases = {
        "fell from -2.00 to -3.50": changed(rising(), -1, reward_heldout=-3.5),
        "did not change measurably: -2.00 before, -1.90 after": changed(rising(), -1, reward_heldout=-1.9),
        "not a number at iteration 20": changed(rising(), -1, reward_heldout=math.nan),
        "rose from -2.12 to -0.432": [x for x in rising() if x != evaluation(0, -2.0, 0.0)],
        "Held-out reward is -0.432 (": rising()[2:],
        "No result yet": rising()[:5],
    }
    for count, (words, lines) in enumerate(cases.items()):
        assert words in headline(read_record(folder(tmp_path / str(count), lines)))


@pytest.mark.parametrize(("exact", "said"), [(False, False), (True, True)])
def test_a_share_of_an_untrusted_optimum_is_a_warning_and_no_headline(tmp_path: Path, exact: bool, said: bool) -> None:
    lines = changed(rising(), 0, objective_trusted=0.0, objective_effective_samples=3.25)
    if exact:
        lines[0]["objective/J_star_exact"] = 0.5
    run = read_record(folder(tmp_path, lines))
    assert ("recovered" in headline(run)) == said
    warned = [text for text in warnings(run) if "J* is only a rough estimate" in text]
    assert len(warned) == (not said)
    assert all("3.25 effective samples" in text and "(48%)" in text for text in warned)


def test_a_good_run_has_no_warning(made: tuple[Path, str]) -> None:
    assert warnings(read_record(made[0])) == []
    assert 'class="warning"' not in made[1]


def test_warnings_of_runs_that_ended_early(tmp_path: Path) -> None:
    stopped = read_record(folder(tmp_path / "a", rising()[:-1], stopped="the disk is full."))
    assert "The run stopped early, at iteration 20 of 20: the disk is full." in warnings(stopped)
    unfinished = read_record(folder(tmp_path / "b", rising()[:9], finished=False))
    assert any("unfinished: 7 of 20" in text for text in warnings(unfinished))


def test_warning_when_heldout_reward_falls_while_training_reward_rises(tmp_path: Path) -> None:
    lines = changed(rising(), -1, reward_heldout=-1.6, objective_J=-1.0)
    found = warnings(read_record(folder(tmp_path / "a", lines)))
    assert any("-1.20 at iteration 10 to -1.60 at 20" in text and "training reward rises" in text for text in found)
    falling = [{**x, "reward/mean": -x["iteration"]} if "seconds" in x else x for x in lines]
    assert not any("training reward rises" in x for x in warnings(read_record(folder(tmp_path / "b", falling))))
    within_noise = changed(rising(), -1, reward_heldout=-1.3)
    assert not any("training reward rises" in x for x in warnings(read_record(folder(tmp_path / "c", within_noise))))


def test_warning_when_j_falls(tmp_path: Path) -> None:
    found = warnings(read_record(folder(tmp_path, changed(rising(), -1, objective_J=-3.0))))
    assert any("J was higher at iteration 10 (-1.45, now -3.00)" in text for text in found)
    assert any("J fell from -2.00 to -3.00" in text for text in found)


def test_warning_of_rewards_that_are_no_numbers(tmp_path: Path) -> None:
    found = warnings(
        read_record(folder(tmp_path, changed(changed(rising(), 4, reward_mean=math.nan), 7, reward_mean=None)))
    )
    assert "The training reward is not a number in 2 iterations, the first being 3." in found


def test_numbers() -> None:
    given = (0.0, -0.42137, 1234567, 12345.6, 9.991e-6, math.nan, math.inf, None, "x")
    shown = ["0.00", "-0.421", "1,234,567", "12,346", "9.99e-06", "n/a", "inf", "n/a", "n/a"]
    assert [number(x) for x in given] == shown
    assert aligned([-12.345, 0.5, math.nan]) == ["-12.3", "0.5", "n/a"]
    assert [duration(x) for x in (8.4, 75.0, 7260.0, math.nan)] == ["8 s", "1 min 15 s", "2 h 1 min", "n/a"]


# --- hostile, missing and broken pieces -------------------------------------------------------------------------------


def test_text_from_outside_is_escaped(tmp_path: Path, quick: list[int]) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=y>'
    path = folder(tmp_path, changed(rising(), -1, **{f"judge_{evil}": 1.0}), None, {
        "recipe": evil, evil: evil, "command": ["scoreact", evil], "options": {evil: evil},
    }, stopped=evil)  # fmt: skip
    start = json.loads((path / "config.json").read_text(encoding="utf-8"))
    start["config"][evil], start["versions"][evil] = evil, evil
    checkpoint.write_json(path / "config.json", start)
    judged = dataclasses.replace(gaussian(), judge=lambda images, condition: {}, labels={"problem": evil})
    page = report.write(path, judged).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(") >= 9  # title, recipe, label, stopped, command, options, judge, ...


def test_a_folder_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    page = report.write(folder(tmp_path, [], finished=False), gaussian()).read_text(encoding="utf-8")
    assert "No result yet" in page
    assert "unfinished: 0 of 20" in page
    assert "holds no trained weights yet" in page
    assert page.count("not measured yet") == len(CURVES)
    assert "<img" not in page


def test_an_unfinished_run_shows_its_best_weights(tmp_path: Path) -> None:
    path = folder(tmp_path, rising()[:14], gaussian(), finished=False)
    (path / "best").mkdir()
    (path / "model.safetensors").rename(path / "best/model.safetensors")
    page = report.write(path, gaussian()).read_text(encoding="utf-8")
    assert (path / "samples.png").is_file()
    assert "dpm_solver_pp_2m" in page


def test_damaged_files_become_notes(tmp_path: Path) -> None:
    path = folder(tmp_path, changed(rising(), -1, policy_kl=math.nan, judge_frechet=math.nan), gaussian())
    (path / "model.safetensors").write_bytes(b"cut short")
    (path / "result.json").write_text("{", encoding="utf-8")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 21, "rewa\n')
    page = report.write(path, gaussian()).read_text(encoding="utf-8")
    assert "not a complete safetensors file" in page
    assert "result.json cannot be read" in page
    assert f"Line {len(rising()) + 1} of metrics.jsonl cannot be read" in page
    assert "rose from -2.00 to -0.432" in page


def test_weights_of_another_model_become_a_note(tmp_path: Path, quick: list[int]) -> None:
    page = report.write(folder(tmp_path, rising(), gaussian(dim=3)), gaussian()).read_text(encoding="utf-8")
    assert "do not fit this model" in page
    assert "rose from" in page


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder"):
        report.write(tmp_path, gaussian())


def test_a_failing_reward_costs_only_its_piece_and_a_mistake_is_not_hidden(tmp_path: Path) -> None:
    def failing(error: Exception) -> Problem:
        def reward(points: Tensor, condition: Condition) -> Tensor:
            raise error

        return dataclasses.replace(gaussian(), reward=reward)

    path = folder(tmp_path, rising(), gaussian())
    page = report.write(path, failing(ValueError("no <reward> today"))).read_text(encoding="utf-8")
    assert page.count("ValueError: no &lt;reward&gt; today") == 2
    assert "rose from" in page
    with pytest.raises(AssertionError):
        report.write(path, failing(AssertionError()))


# --- samples ----------------------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    """A score model of 1 x 6 x 8 pictures: Gaussian data with a trainable mean; the prompt is ignored."""

    schedule = VP()

    def __init__(self, shape: tuple[int, ...] = (1, 6, 8)) -> None:
        super().__init__()
        self.shape, self.mean = shape, nn.Parameter(torch.zeros(1))

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return torch.randn(len(condition), *self.shape, generator=generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition(list(prompts))

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        alpha = self.schedule.alpha(t).reshape(-1, *[1] * (x.ndim - 1))
        return alpha * self.mean - x

    def decode(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def pictures(prompts: Sequence[str], shape: tuple[int, ...] = (1, 6, 8)) -> Problem:
    return Problem(Pictures(shape), lambda x, c: x.flatten(1).mean(1), prompts, lambda: nn.Identity())


def test_pictures_become_a_gallery_and_a_film_strip(tmp_path: Path, quick: list[int]) -> None:
    prompts = [
        f"$x_{i} \\frac$ a very long prompt {'and more ' * 20}" for i in range(12)
    ]  # broken mathematics, if read
    path = folder(tmp_path, rising(), pictures(prompts))
    page = report.write(path, pictures(prompts)).read_text(encoding="utf-8")
    assert (path / "samples.png").is_file()
    assert (path / "filmstrip.png").is_file()
    assert "The first 10 of 12 prompts." in page
    assert 'class="note"' not in page


def test_videos_become_a_film_and_only_one_is_decoded_at_a_time(tmp_path: Path, quick: list[int]) -> None:
    problem = pictures([f"prompt {i}" for i in range(6)], (3, 12, 40, 200))
    path = folder(tmp_path, rising(), problem)
    decode, alive, most = Pictures.decode, [], [0]

    def watched(self: Pictures, x: Tensor) -> Tensor:
        most[0] = max(most[0], sum(map(len, (video for kept in alive if (video := kept()) is not None))))
        video = decode(self, x)
        alive.append(weakref.ref(video))
        return video

    policy = Policy(problem.model)
    model = problem.model
    model.decode = types.MethodType(watched, model)  # type: ignore[method-assign]
    policy.reference.decode = types.MethodType(watched, policy.reference)  # type: ignore[method-assign]
    found = before_and_after(policy, problem, CONFIG)
    assert len(alive) >= 16  # two of four prompts on both sides
    assert most[0] <= 1
    film = Image.open(io.BytesIO(found[0].film or b""))
    assert film.format == "GIF"
    assert film.n_frames == 12
    assert film.size[0] == 4 * (96 + 4) - 4 + 24  # 96 pixels each
    page = report.write(path, problem).read_text(encoding="utf-8")
    embedded = base64.b64decode(re.search(r"data:image/gif;base64,([^\"]+)", page)[1])  # type: ignore[index]
    assert embedded == (path / "samples.gif").read_bytes()
    assert "left of the gap before" in page
    assert "The first 4 of 6 prompts." in page


def test_a_film_of_long_videos_has_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, which nothing compresses: fewer frames are shown, the first and the last among them."""
    monkeypatch.setattr("scoreact.report.pictures.SIDE", 24)
    monkeypatch.setattr("scoreact.report.pictures.FILM_PIXELS", 100_000)
    problem = pictures(["a", "b", "c", "d"], (3, 60, 24, 24))
    found = before_and_after(Policy(problem.model), problem, CONFIG)[0]
    film = found.film or b""
    assert Image.open(io.BytesIO(film)).n_frames == 6
    assert "6 of 60 frames" in found.caption
    assert len(film) < 125_000


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 16)])
def test_other_shapes_become_lines(tmp_path: Path, shape: tuple[int, ...], quick: list[int]) -> None:
    path = folder(tmp_path, rising(), pictures(["a"], shape))
    page = report.write(path, pictures(["a"], shape)).read_text(encoding="utf-8")
    assert (path / "samples.png").is_file()
    assert "a colour is the same noise" in page


def test_before_and_after_share_their_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[int]) -> None:
    seen: list[dict[str, Tensor]] = []
    scatter: Callable[..., Any] = figures.scatter
    monkeypatch.setattr(figures, "scatter", lambda clouds, reward: seen.append(dict(clouds)) or scatter(clouds, reward))
    problem = gaussian()
    path = folder(tmp_path, rising(), problem)
    report.write(path, problem, Policy(problem.model))  # the policy is the reference
    report.write(path, gaussian())  # the folder's weights
    same, tuned = seen
    assert torch.equal(same["before"], same["after"])
    assert torch.equal(same["before"], tuned["before"])
    moved = (tuned["after"] - tuned["before"]).norm(dim=1)
    assert 0 < float(moved.max()) < 0.5  # weights 0.01 away
    law, _ = problem.model.base.tilted(problem.reward.linear, problem.reward.quadratic, 0.5)  # type: ignore[attr-defined]
    mean = (law.weights[:, None] * law.means).sum(0)
    optimum = same["optimum, closed form"]
    assert (optimum.mean(0) - mean).abs().tolist() < (4 * optimum.std(0) / len(optimum) ** 0.5).tolist()


def test_the_optimum_is_left_out_where_its_closed_form_does_not_hold(tmp_path: Path, quick: list[int]) -> None:
    problem = gaussian()
    path = folder(tmp_path, rising(), problem)
    start = json.loads((path / "config.json").read_text(encoding="utf-8"))
    sizes = []
    for noise_scale in (1.0, 0.5):
        start["config"]["noise_scale"] = noise_scale
        checkpoint.write_json(path / "config.json", start)
        report.write(path, problem, Policy(problem.model))
        header = (path / "samples.png").read_bytes()[16:20]
        sizes.append(int.from_bytes(header, "big"))  # the picture's width
    assert sizes[1] == pytest.approx(2 / 3 * sizes[0], rel=0.1)


def test_the_transfer_table_is_kept_until_the_weights_change(tmp_path: Path, quick: list[int]) -> None:
    path = folder(tmp_path, rising(), gaussian())
    report.write(path, gaussian())
    report.write(path, gaussian())
    assert len(quick) == 1
    report.write(path, gaussian(), Policy(gaussian().model))
    assert len(quick) == 2


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_gallery_puts_every_picture_in_its_place() -> None:
    before = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 14, 14) / 10  # two prompts, two columns
    image = gallery(["a", "b"], before, before + 0.5).axes[0].images[0].get_array()
    assert image is not None
    step, half = 15, 2 * 15 + 7  # a gap of 1, half a picture between the halves
    corners = [[float(image[i * step, j, 0]) for j in (0, step, half, half + step)] for i in (0, 1)]
    assert corners == [pytest.approx([0.0, 0.1, 0.5, 0.6]), pytest.approx([0.2, 0.3, 0.7, 0.8])]
    assert [float(image[0, j, 0]) for j in (14, 30, 36)] == [1.0, 1.0, 1.0]


def test_curves_show_the_numbers_and_leave_out_what_is_not_finite() -> None:
    lines = Lines(
        [iteration(1, -1.0), iteration(2, math.nan), iteration(3, -0.5)], [evaluation(0, -2.0, 0.0)], REFERENCE
    )
    drawn = {curve.name: curve_figure(curve, lines) for curve in CURVES}
    assert drawn["reward"] is not None
    training = drawn["reward"].axes[0].lines[0]
    assert list(training.get_xdata()) == [1, 3]
    assert list(training.get_ydata()) == [-1.0, -0.5]
    nothing = Lines([{"iteration": 1, "reward/mean": None}], [], {})
    assert all(curve_figure(curve, nothing) is None for curve in CURVES)
    assert cost_figure([]) is None


def test_intervals_are_95_percent() -> None:
    objective = next(curve for curve in CURVES if curve.name == "objective")
    figure = curve_figure(objective, Lines([], [evaluation(5, -1.0, 0.5)], REFERENCE))
    assert figure is not None
    (bars,) = figure.axes[0].containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((-1.25 - 1.96 * 0.05, -1.25 + 1.96 * 0.05))


def test_an_optimum_hardly_known_does_not_flatten_the_curve() -> None:
    objective = next(curve for curve in CURVES if curve.name == "objective")
    wild = {**REFERENCE, "objective/J_star_low": -1e4, "objective/J_star_high": 1e4}
    figure = curve_figure(objective, Lines([], [evaluation(5, -1.0, 0.5)], wild))
    assert figure is not None
    bottom, top = figure.axes[0].get_ylim()
    assert -3 < bottom < -2.1
    assert 0.5 < top < 1


def test_a_resumed_run_says_again_that_its_optimum_is_unknown() -> None:
    """A file of lines holds null where the run's own line had inf."""
    line = {"objective/effective_samples": 1.0, "objective/J_ref": 0.5, "objective/J_ref_se": 0.1} | {
        f"objective/J_star{end}": None for end in ("", "_low", "_high")
    }
    assert "J*    unknown" in reference_lines(line)[1]
