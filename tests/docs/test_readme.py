"""The README's figures that have machine-readable results beside them say the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_arenas_table_is_that_of_its_results() -> None:
    spec = importlib.util.spec_from_file_location("arena_readme", ROOT / "benchmarks" / "arena_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(module.MARKS[0])
    shown, _, _ = rest.partition(module.MARKS[1])
    assert shown == module.made(ROOT / "benchmarks" / "arena", ROOT / "benchmarks" / "arena-third")
    assert "| `ctrl` |" in shown
