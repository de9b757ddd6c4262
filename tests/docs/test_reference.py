"""The reference pages name everything: metrics, events, files, glossary and navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_problem import needed
from test_layout import WINGS
from torch import Tensor

import scoreact as sa
from scoreact.algorithms.registry import rules
from scoreact.recipes.base import recipes
from scoreact.recipes.gaussian import build
from scoreact.rewards.onnx_operators import OPERATORS
from scoreact.training.config import updated
from scoreact.types import Condition, Metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOURCE = DOCS.parent / "src" / "scoreact"
METRICS = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
EVENTS = (DOCS / "reference" / "events.md").read_text(encoding="utf-8")
FAMILIES = "reward|policy|objective|value|q|cost|sample|judge|drift|guard|surrogate|online"
SMALL: dict[str, Any] = {
    "iterations": 2, "batch_size": 32, "reference_batches": 2, "heldout_samples": 64, "steps": 4,
    "evaluate_every": 1, "checkpoint_every": 1, "device": "cpu", "kl_weight": 0.5,
}  # fmt: skip


def told(page: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", page))


def judge(samples: Tensor, condition: Condition) -> Metrics:
    return {"judge/property": float((samples > 0).float().mean())}


def train(rule: str, out: Path | None = None, **changes: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """A few iterations with everything on: the lines of metrics.jsonl and the kinds of event."""
    torch.manual_seed(0)
    problem, kinds = build(width=16), list[str]()
    config = updated(recipes()["gaussian"].config, {"algorithm": rule, **SMALL, **changes})
    result = sa.finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=config, out=out,
        judge=judge, optimum=problem.optimum, on_event=lambda kind, line: kinds.append(kind),
    )  # fmt: skip
    return result.history, kinds


@pytest.mark.parametrize("rule", sorted(rules()))
def test_every_metric_of_a_run_stands_on_the_page(rule: str, tmp_path: Path) -> None:
    lines, kinds = train(rule, target_kl=0.1, **needed(rule, tmp_path))
    found = {name for line in lines for name in line}
    assert "objective/recovered" in found
    assert sorted(found - told(METRICS)) == []
    assert sorted(set(kinds) - told(EVENTS)) == []
    assert {"reference", "evaluation", "iteration", "finished"} <= set(kinds)


def test_every_file_of_a_run_stands_on_the_page(tmp_path: Path) -> None:
    _, kinds = train("ctrl", tmp_path / "run")
    assert "checkpoint" in kinds
    assert sorted(set(kinds) - told(EVENTS)) == []
    page = told((DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8"))
    named = {re.split(r"/", word)[0] for word in page}
    written = {path.name for path in (tmp_path / "run").iterdir() if path.suffix != ".png"}
    assert sorted(written - named) == []


def test_every_metric_in_the_source_stands_on_the_page() -> None:
    """Also those that no small run reaches, such as what rounding costs."""
    pattern = re.compile(rf'f?"((?:{FAMILIES})/[a-z_A-Z]+)"')
    found = {name for path in SOURCE.rglob("*.py") for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert len(found) > 40
    assert sorted(found - told(METRICS)) == []


def test_every_wing_is_in_contributing() -> None:
    """One line each, in the order of the imports."""
    page = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE)
    assert [wing for wing in listed if (SOURCE / wing).is_dir() or wing == "types"] == list(WINGS)


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^([^\n:].*)\n:   ", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=lambda term: term.replace("\\", "").lower())


def test_every_page_is_in_the_navigation() -> None:
    """A page that nobody can find is not there; the two notebooks become pages when the site is built."""

    class Loader(yaml.SafeLoader):
        pass

    nav = yaml.load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    listed = {page for section in nav for pages in section.values() for page in leaves(pages)}
    made = {f"examples/{path.stem}.md" for path in (DOCS.parent / "examples").glob("*.ipynb")}
    assert listed == made | {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def leaves(pages: list[Any]) -> list[str]:
    return [page if isinstance(page, str) else next(iter(page.values())) for page in pages]


def test_every_onnx_operator_is_listed() -> None:
    page = (DOCS / "reference" / "rewards.md").read_text(encoding="utf-8")
    listed = page.split("Known\noperators:\n\n")[1].split(".\n")[0]
    assert [name.strip() for name in listed.split(",")] == sorted(OPERATORS)
