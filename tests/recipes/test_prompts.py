"""Prompts from files: every form gives the same prompts and metadata; what cannot be read is refused with file and line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.prompts import check_spelling, give_metadata, read_prompts

SHARED = Path(os.environ.get("SCOREACT_PROMPTS", "."))  # a folder of the published prompt sets
ROWS = [
    {"prompt": 'a sign that says "yes, no"', "tag": "text", "count": "2"},
    {"prompt": "two dogs\u2028and a cät", "tag": "", "count": "3"},
    {"prompt": "line one\nline two", "tag": "x", "count": ""},
]


def written(kind: str, rows: list[dict[str, Any]], folder: Path, encoding: str = "utf-8") -> Path:
    import csv
    import io

    path, text = folder / f"prompts.{kind}", ""
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "jsonl":
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    elif kind == "json":
        text = json.dumps(rows)
    else:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue() + "\r\n"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_table_gives_the_same_prompts_and_metadata(kind: str, tmp_path: Path) -> None:
    found = read_prompts(written(kind, ROWS, tmp_path))
    assert list(found) == [row["prompt"] for row in ROWS]
    assert list(found.values()) == [{"tag": row["tag"], "count": row["count"]} for row in ROWS]
    assert found.notes == []
    renamed = [{"caption" if k == "prompt" else k: v for k, v in row.items()} for row in ROWS]
    path = written(kind, renamed, tmp_path)
    assert read_prompts(path, "caption") == found
    with pytest.raises(sa.SettingError, match=r"no column 'prompt' \(columns: caption, tag, count\)"):
        read_prompts(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_byte_order_mark_and_windows_lines_are_no_part_of_a_prompt(kind: str, tmp_path: Path) -> None:
    text = {
        "txt": "a cat\r\n\r\na dog\r\n",
        "jsonl": '{"prompt": "a cat"}\r\n{"prompt": "a dog"}',
        "csv": "Prompt\r\na cat\r\na dog",
    }
    path = tmp_path / f"prompts.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + text[kind].encode())
    assert list(read_prompts(path)) == ["a cat", "a dog"]


def test_a_text_is_a_prompt_and_a_line_too() -> None:
    assert read_prompts("a cat in a hat.") == {"a cat in a hat.": {}}
    assert read_prompts("") == {"": {}}, "an unconditional model's"
    assert list(read_prompts("so " * 200)) == ["so " * 200], "longer than a file's name may be"


def test_repeated_prompts_count_once_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 1}, {"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(path)
    assert found == {"a": {"n": 1}, "b": {"n": 1}}
    assert found.notes == [
        f"{path}: 2 rows repeat a prompt of an earlier row, which counts once; some have other metadata there (first at "
        f"{path}, line 4), which are left out."
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"line 2 is no JSON \(Expecting value at column 12\)"),
        ("a.jsonl", b'{"prompt": "a"}\n\n[1]\n', r"line 3 is list; expected an object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"line 2: there is no column 'prompt' \(columns: text\)"),
        ("a.jsonl", b'{"prompt": 3}\n', r"line 1: prompt is 3; expected a prompt"),
        ("a.jsonl", b'{"prompt": " "}\n', r"line 1: prompt is ' '; expected a prompt that is not empty"),
        ("a.jsonl", b'{"Prompt": "a", "PROMPT": "b"}\n', r"more than one column 'prompt'"),
        ("a.json", b'{"prompt": "a"}', r"holds dict; expected a list"),
        ("a.json", b'[{"prompt": "a"},\n 3]', r"entry 2 is int"),
        (
            "a.csv",
            b"prompt,tag\na,b\n\na cat, sitting,c\n",
            r"line 4 has 3 fields, and the header has 2 \(prompt, tag\)",
        ),
        ("a.csv", b'prompt,tag\n"a\nb",c\n"d,e\n', r"line 4 is no row of a table \(unexpected end of data\)"),
        ("a.csv", b'prompt,tag\n"a" b,c\n', r"line 2 is no row of a table"),
        ("a.csv", b"prompt,tag,tag\n", r"line 1: the column 'tag' stands there twice"),
        ("a.csv", b"prompt,tag\n", r"holds no prompt"),
        ("a.tsv", b"prompt\ttag\n\tb\n", r"line 2: prompt is ''"),
        ("a.txt", b"\n \n", r"holds no prompt"),
        ("a.txt", b'{"prompt": "a"}\n{"prompt": "b"}\n', r"an object a line, as a \.jsonl file does"),
        ("a.ndjson", b'{"prompt": "a"}\n', r"an object a line, as a \.jsonl file does"),
        ("a.lst", b'["a",\n"b"]\n', r"a list, as a \.json file does"),
        ("a.yaml", b"- a\n- b\n", r"is no list of lines; give \.txt"),
        ("a.py", b"def prompts():\n    return 'a'\n", r"names no function; give '.*a\.py:function'"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}\n', r"line 1 cannot be read as JSON: the key 'prompt' stands"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', r"line 1: prompt is .* a character that is no text"),
        ("a.jsonl", b'{"prompt": "a\\u0000b"}\n', r"line 1: prompt is .* a character that is no text"),
        ("a.txt", b"a\nb\xff\n", r"a.txt, line 2 is not UTF-8"),
        ("a.txt", "a cat".encode("utf-16"), r"line 1 is not UTF-8"),
        ("a.bin", b"a\0b", r"line 1 holds a NUL, so it is no text"),
        ("a.parquet", b"PAR1 and no more", r"is no Parquet file that can be read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(sa.SettingError, match=said):
        read_prompts(tmp_path / name)


def test_files_that_are_not_there_and_columns_of_text_files(tmp_path: Path) -> None:
    for kind in ("txt", "jsonl", "csv", "parquet"):
        with pytest.raises(sa.SettingError, match="there is no such file"):
            read_prompts(tmp_path / f"nowhere.{kind}")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(sa.SettingError, match="text file without columns; leave out prompt_column 'caption'"):
        read_prompts(tmp_path / "a.txt", "caption")


@pytest.mark.parametrize(
    "text",
    ["animals.text", "./animlas.md", "prompts/animals", "~/animals", "animals.parquet", "a b.txt", "mine.py:draw"],
)
def test_a_name_of_a_file_that_is_not_there_is_no_prompt(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sa.SettingError, match="there is no such file"):
        read_prompts(text)


def test_a_word_nearly_a_files_name_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals.txt").write_text("cat\n")
    for text in ("animlas", "animals", "animals.tx"):
        with pytest.raises(sa.SettingError, match=r"did you mean 'animals\.txt'"):
            check_spelling(text)
    with pytest.raises(sa.SettingError, match=r"'\.' is a folder"):
        check_spelling(".")
    for text in ("cat", "a hat", "animals.txt", "two animals of a kind"):
        check_spelling(text)


def test_lines_that_end_a_line_elsewhere_only_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("# mine\na\u2028b\nc\x0cd\n".encode())
    found = read_prompts(tmp_path / "a.txt")
    assert list(found) == ["# mine", "a\u2028b", "c\x0cd"]
    assert found.notes == [f"{tmp_path / 'a.txt'}: 1 lines begin with #; they are prompts as the others are."]


def test_parquet_leaves_out_bytes_and_makes_dates_text(tmp_path: Path) -> None:
    import datetime

    day = datetime.date(2024, 2, 1)
    path = written("parquet", [{"prompt": "a", "jpg": b"\xff\xd8", "day": day, "tags": ["x", "y"]}], tmp_path)
    assert read_prompts(path) == {"a": {"day": "2024-02-01", "tags": ["x", "y"]}}


def test_parquet_without_pyarrow_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(sa.SettingError, match=r"need pyarrow; pip install 'scoreact\[parquet\]'"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.skipif(
    "SCOREACT_PROMPTS" not in os.environ, reason="SCOREACT_PROMPTS names no folder of the published prompt sets"
)
def test_the_fields_own_prompt_sets() -> None:
    parti = read_prompts(SHARED / "PartiPrompts.tsv")
    assert len(parti) == 1632
    assert parti["bond"] == {
        "Category": "Abstract", "Challenge": "Basic", "Note": "Biology-inspired concepts with multiple meanings"
    }  # fmt: skip
    quoted = [prompt for prompt in parti if prompt.startswith('"')]
    assert quoted
    assert all(f"\n{prompt}\t" in (SHARED / "PartiPrompts.tsv").read_text(encoding="utf-8") for prompt in quoted)
    geneval = read_prompts(SHARED / "geneval.jsonl")
    assert len(geneval) == 553
    assert geneval["a photo of a bench"]["include"] == [{"class": "bench", "count": 1}]
    assert len(read_prompts(SHARED / "pickapic_test.txt")) == 2048
    assert len(read_prompts(SHARED / "imagereward_benchmark.json")) == 100


def test_metadata_need_a_model_that_hands_them_on(tmp_path: Path) -> None:
    model = GaussianMixture.__new__(GaussianMixture)
    give_metadata(model, {"a": {}})
    with pytest.raises(sa.ModelError, match="GaussianMixture has no attribute `metadata`"):
        give_metadata(model, {"a": {"n": 1}})


def test_metadata_of_a_table_reach_the_reward(tmp_path: Path) -> None:
    """By `finetune` with a mapping and by the command line's recipe alike."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import make, spelling_tokenizer

    from scoreact.models.pipelines.opening import pipeline_model
    from scoreact.recipes.pipeline import build

    path = tmp_path / "prompts.csv"
    path.write_text("caption,wanted\na cat,0.25\ntwo dogs,0.75\na cat,0.5\n")
    pipeline = make("sd", spelling_tokenizer())
    pipeline.save_pretrained(tmp_path / "pipeline")
    seen: list[tuple[str, str]] = []

    def wanted(images: Tensor, prompts: list[str], metadata: list[dict[str, str]]) -> Tensor:
        seen.extend((prompt, entry["wanted"]) for prompt, entry in zip(prompts, metadata, strict=True))
        return -(images.mean((1, 2, 3)) - torch.tensor([float(entry["wanted"]) for entry in metadata])).square()

    prompts = read_prompts(path, "caption")
    model = pipeline_model(pipeline, lora_rank=2, guidance_scale=1.0)
    result = sa.finetune(
        model, wanted, prompts, iterations=1, batch_size=4, reference_batches=1, steps=2, heldout_samples=4, device="cpu",
        algorithm="ddpo",
    )  # fmt: skip
    assert set(seen) == {("a cat", "0.25"), ("two dogs", "0.75")}
    assert result.problem.prompts == ["a cat", "two dogs"]
    problem = build(str(tmp_path / "pipeline"), str(path), "caption", lora_rank=2)
    condition = problem.model.condition(["two dogs", "a cat"])
    assert [entry["wanted"] for entry in condition.metadata] == ["0.75", "0.25"]
    assert "repeat a prompt" in problem.model.notes()[0]  # type: ignore[attr-defined]


def test_a_tab_separated_file_without_quoting_keeps_its_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\ttag\n"yes"\tb\n"no" on a sign\tc\n')
    assert read_prompts(path) == {'"yes"': {"tag": "b"}, '"no" on a sign': {"tag": "c"}}
    path.write_text('prompt\ttag\n"yes"\tb\n')
    assert read_prompts(path) == {"yes": {"tag": "b"}}
    path.write_text('prompt\ttag\n"no" on a sign\tc\td\n')
    with pytest.raises(sa.SettingError, match=r"line 2 has 3 fields, and the header has 2 \(prompt, tag\)\."):
        read_prompts(path)


def test_a_text_to_image_pipeline_is_not_trained_without_a_prompt() -> None:
    """It would be on "", in silence. One that reads no prompts is."""
    pytest.importorskip("diffusers")
    from tiny_pipelines import make, spelling_tokenizer

    from scoreact.models.pipelines.opening import pipeline_model

    quick = {"iterations": 1, "batch_size": 2, "reference_batches": 1, "steps": 2, "heldout_samples": 2, "algorithm": "ddpo",
             "device": "cpu"}  # fmt: skip

    def bright(images: Tensor) -> Tensor:
        return 100 * images.mean((1, 2, 3))

    model = pipeline_model(make("sd", spelling_tokenizer()), lora_rank=2, guidance_scale=1.0)
    for prompts in ([], [""]):
        with pytest.raises(
            sa.SettingError, match=r"no prompts are given, .* give --prompts FILE, or finetune\(model, rew"
        ):
            sa.finetune(model, bright, prompts, **quick)
    with pytest.raises(sa.SettingError, match=r"prompts\[1\] is 3 \(int\); expected a text"):
        sa.finetune(model, bright, ["a cat", 3], **quick)  # type: ignore[list-item]
    result = sa.finetune(model, bright, ["a cat", "a cat", "a dog"], **quick)
    assert result.problem.prompts == ["a cat", "a dog"], "one that repeats counts once"
    unconditional = pipeline_model(make("ddpm", spelling_tokenizer()), lora_rank=2)
    assert sa.finetune(unconditional, bright, **quick).problem.prompts == [""]


def test_prompts_that_repeat_and_a_network_that_nobody_asks_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    from scoreact.recipes.gaussian import build

    problem = build(width=8)
    quick = {
        "iterations": 1,
        "batch_size": 4,
        "reference_batches": 1,
        "steps": 2,
        "heldout_samples": 4,
        "device": "cpu",
    }
    sa.finetune(problem, None, ["", ""], value_network=problem.value_network, algorithm="ddpo", progress=True, **quick)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 prompts repeat another; each counts once." in said
    assert "value_network is given, and ddpo uses none: it does nothing here." in said
