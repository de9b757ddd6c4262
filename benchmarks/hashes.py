"""Is a change of the code no change of the numbers? Hashes of what every recipe and every rule leaves after a few iterations.

    python benchmarks/hashes.py --write before.json          # on the old code
    python benchmarks/hashes.py --compare before.json        # on the new code: says which runs differ, and in what
    python benchmarks/hashes.py --compare before.json --but report reference.safetensors      # whatever these have become

Weights, metric lines and the words of the report, for two seeds. Bits differ between processors and versions of torch, so a
table is for one machine, before and after: `hashes-0.1.0.json` is of the last commit before the wings, on an AMD EPYC with
AVX512-BF16 and the versions of constraints.txt. Uses the command line only, which stays when modules move.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RULES = ("ctrl", "ctrl_trpo", "ctrl_pathwise", "q_learning", "ddpo", "dpok", "flow_grpo", "diffusion_nft", "rwr", "ram",
         "draft", "adjoint_matching", "dpo")  # fmt: skip
SMALL = (
    "--iterations 3 --batch-size 32 --minibatch-size 128 --reference-batches 2 --heldout-samples 20 --evaluate-every 2"
)
SMALL += " --checkpoint-every 2 --device cpu"
VALUE = "--value-first-steps 4 --value-steps 2 --value-batch-size 64"


def runs(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and `scoreact train` words, outputs aside."""
    for seed in (0, 1):
        for rule in RULES:
            small = SMALL.replace("--minibatch-size 128 ", "") if rule == "ctrl_trpo" else SMALL  # which takes all rows
            yield f"gaussian/{rule}/{seed}", f"gaussian --algorithm {rule} {small} --seed {seed}"
        for value in ("residual", "surrogate"):
            words = f"plain --algorithm ctrl --value {value} --value-loss soft {SMALL} {VALUE} --seed {seed}"
            yield f"plain/ctrl/{value}/{seed}", words
        for recipe in ("plain", "busy", "bright", "classifier", "series"):
            rule = "--algorithm ctrl_pathwise " if recipe == "plain" else ""  # its own is plain/surrogate
            yield f"{recipe}/{seed}", f"{recipe} {rule}{SMALL} {VALUE} --seed {seed}"
        yield f"plain/surrogate/{seed}", f"plain {SMALL} --seed {seed}"
        yield f"plain/linear/{seed}", f"plain --algorithm ctrl_pathwise --value linear {SMALL} --seed {seed}"
        yield f"plain/ddpo/{seed}", f"plain --algorithm ddpo {SMALL} --seed {seed}"
        extra = "--exploration gaussian --grid random --noise flow_grpo --noise-scale 0.7 --target-kl 0.5"
        yield f"gaussian/ctrl/settings/{seed}", f"gaussian --algorithm ctrl {extra} {SMALL} {VALUE} --seed {seed}"
    if (folder / "pipeline").is_dir():
        common = "--batch-size 6 --steps 2 --iterations 2 --reference-batches 1 --heldout-samples 4 --device cpu"
        common += " --minibatch-size 12 --option lora_rank=2"
        value = " --value-batch-size 8 --value-steps 2 --value-first-steps 2"
        for rule, more in (("ctrl", value), ("ddpo", "")):
            words = (
                f"{folder / 'pipeline'} --reward jpeg_compressibility --prompts cat --algorithm {rule} {common}{more}"
            )
            yield f"pipeline/{rule}/0", words


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def words_of(report: str) -> str:
    """The report's text without pictures, times, paths and versions."""
    text = re.sub(r"<style.*?</style>|<script.*?</script>", " ", report, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    text = re.sub(r"\d[\d.,]* ?(ms|s|min|h)\b", "TIME", text)
    text = re.sub(r"\S*/\S*", "PATH", text)
    return " ".join(text.split())


def left_by(run: Path) -> dict[str, str]:
    """What a run left, hashed."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    lines = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result.pop("seconds")
    found = {
        "metrics": digest(json.dumps(lines, sort_keys=True).encode()),
        "result": digest(json.dumps(result, sort_keys=True).encode()),
        "report": digest(words_of((run / "report.html").read_text(encoding="utf-8")).encode()),
    }
    for path in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found[str(path.relative_to(run))] = digest(path.read_bytes())
    for path in sorted(run.glob("checkpoints/*/tensors.safetensors")):
        found[str(path.relative_to(run))] = digest(path.read_bytes())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--but", nargs="+", default=[], metavar="FILE", help="what need not be the same")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name starts so")
    options = parser.parse_args()
    import torch

    try:
        from scoreact.cli import main as cli
    except ImportError:  # before the wings
        from scoreact import cli  # type: ignore[no-redef]

    torch.set_num_threads(1)
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.suppress(ImportError):
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            from tiny_pipelines import make, spelling_tokenizer

            make("sd", spelling_tokenizer()).save_pretrained(folder / "pipeline")
        for number, (run, text) in enumerate(runs(folder)):
            if not run.startswith(options.only):
                continue
            out = folder / f"run-{number}"
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = cli.main(["train", *text.split(), "--out", str(out)])
            table[run] = left_by(out) if status == 0 else {"failed": said.getvalue()[-400:]}
            print(run, *table[run].values(), flush=True)
    if options.write:
        options.write.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    different = 0
    if options.compare:
        before = json.loads(options.compare.read_text(encoding="utf-8"))
        for run, then in before.items():
            if run.startswith(options.only):
                now = table.get(run, {})
                names = [
                    name
                    for name in then.keys() | now.keys()
                    if then.get(name) != now.get(name) and name not in options.but
                ]
                different += bool(names)
                print(f"{run}: {'differs in ' + ', '.join(sorted(names)) if names else 'the same'}")
        before = {run: then for run, then in before.items() if run.startswith(options.only)}
        print(f"{different} of {len(before)} runs differ." if different else f"All {len(table)} runs are the same.")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
