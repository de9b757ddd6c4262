"""Tables of the scripts here in the pages of docs/."""

from __future__ import annotations

from pathlib import Path


def put(text: str, page: Path, marks: tuple[str, str]) -> None:
    """Text between the two marks of a page, in the place of what stood there. Raises SystemExit where it lacks one."""
    whole = page.read_text(encoding="utf-8")
    before, first, rest = whole.partition(marks[0])
    _, last, after = rest.partition(marks[1])
    if not (first and last):
        raise SystemExit(
            f"{page} has no {' and '.join(mark.strip() for mark in marks)}; put these two lines where it goes."
        )
    page.write_text(before + first + text + last + after, encoding="utf-8")
