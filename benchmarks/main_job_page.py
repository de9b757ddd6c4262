"""The main job's tables in README.md and docs/results/main-job.md, made from what `benchmarks/main_job.py` left.

    python benchmarks/main_job.py --seeds 5 --samples 1000 --out main_job.jsonl
    python benchmarks/main_job_page.py main_job.jsonl              # prints both tables
    python benchmarks/main_job_page.py main_job.jsonl --write      # and puts them between the two marks of each page

The README shows the five rows that say most, the results page all of them. The words beside the tables are not written here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from main_job import ROWS, table  # the scripts beside this one
from page_tables import put

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- plain-table -->\n", "<!-- /plain-table -->")
SHORT = ("judge/property", "judge/frechet", "judge/class_error", "policy/kl", "objective/recovered")


def tables(path: Path) -> tuple[str, str]:
    """The short and the whole table of a file of results."""
    content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = table(
        [line for line in content if "seed" in line], next(line["optimum"] for line in content if "optimum" in line)
    )
    rows = whole.splitlines()
    wanted = {ROWS[name] for name in SHORT}
    return "\n".join([*rows[:2], *(row for row in rows[2:] if row.split(" | ")[0].removeprefix("| ") in wanted)]), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md and docs/results/main-job.md")
    options = parser.parse_args()
    short, whole = tables(options.results)
    print(f"{short}\n\n{whole}")
    if options.write:
        put(short + "\n", ROOT / "README.md", MARKS)
        put(whole + "\n", ROOT / "docs" / "results" / "main-job.md", MARKS)


if __name__ == "__main__":
    main()
