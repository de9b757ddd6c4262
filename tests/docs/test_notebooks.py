"""The notebooks run, cell after cell, and what they show becomes a page."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture
def notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: dict, kind: str) -> list[str]:
    """What the cells left of a kind: image/png, or text."""
    found = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    if kind == "text":
        return ["".join(output["text"]) for output in found if "text" in output]
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] if p.stem == "pictures" else [], id=p.stem) for p in NOTEBOOKS]
)
def test_a_notebook_runs(path: Path, notebooks: ModuleType) -> None:
    stored, found = json.loads(path.read_text(encoding="utf-8")), notebooks.run(path)
    assert len(outputs(found, "image/png")) == len(outputs(stored, "image/png")) > 0
    assert [len(text.splitlines()) for text in outputs(found, "text")] == [
        len(text.splitlines()) for text in outputs(stored, "text")
    ]
    assert "recovered" in "".join(outputs(found, "text"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_small_outputs(path: Path, notebooks: ModuleType) -> None:
    """As nbformat 4.5 wants it, every code cell run in order; its page shows every picture."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in stored["cells"]}) == len(stored["cells"])
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text, pictures = notebooks.page(stored, path.stem)
    assert pictures
    for name, content in pictures.items():
        assert f"]({name})" in text
        assert content.startswith(b"\x89PNG")
        assert len(content) < 150_000


def test_a_broken_cell_is_named(tmp_path: Path, notebooks: ModuleType) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": []}
    path = tmp_path / "broken.ipynb"
    cells = [{**cell, "source": ["x = 1\n", "x / 0"]}]
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    with pytest.raises(ZeroDivisionError) as caught:
        notebooks.run(path)
    assert "broken.ipynb, cell 0" in str(caught.traceback[-1])


def test_a_cell_shows_what_jupyter_would(notebooks: ModuleType) -> None:
    """Prints, the figures that are open, the last expression; nothing after a semicolon."""
    source = "import matplotlib.pyplot as plt\nprint('said')\nplt.plot([1, 2]);\n40 + 2"
    said, figure, value = notebooks.outputs_of(source, "cell", {}, 3)
    assert said["text"] == ["said\n"]
    assert base64.b64decode(figure["data"]["image/png"]).startswith(b"\x89PNG")
    assert value["data"]["text/plain"] == ["42"]
    assert value["execution_count"] == 3
    assert notebooks.outputs_of("40 + 2;", "cell", {}, 1) == []
