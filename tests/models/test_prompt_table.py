"""Embeddings of prompts: encoded together, the same bits whoever asks, bounded in memory, the encoders away meanwhile."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import pytest
import torch

import scoreact as sa
from scoreact.models.pipelines import prompt_table
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.pipelines.prompt_table import MIB, PromptTable

pytest.importorskip("diffusers")
from tiny_pipelines import SIZES, inputs, make, spelling_tokenizer

WORDS = ["a", "cat", "two", "dogs", "red", "boat", "on", "sea"]


def rows(count: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"text": (77, 768), "pooled": (640,)}
    return {name: torch.randn(count, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_bit_for_bit_from_memory_and_file(dtype: torch.dtype) -> None:
    """40 prompts of 0.23 MiB (float32) where 2 MiB may be kept."""
    table, whole, generator = PromptTable(2), rows(40, dtype), torch.Generator().manual_seed(1)
    for start in range(0, 40, 8):
        table.add(
            [f"prompt {i}" for i in range(start, start + 8)],
            {name: tensor[start : start + 8] for name, tensor in whole.items()},
        )
        assert 0 < table.memory_bytes <= 2 * MIB
    assert table.row_bytes == (77 * 768 + 640) * dtype.itemsize
    assert table.on_disk >= 40 - 2 * MIB // table.row_bytes
    for _ in range(20):
        wanted = torch.randint(40, (8,), generator=generator)
        found = table.at(wanted)
        assert all(torch.equal(found[name], whole[name][wanted]) for name in whole)
        assert table.memory_bytes <= 2 * MIB
    table.apply(lambda tensor: tensor.double())
    assert torch.equal(table.at(torch.arange(40))["text"], whole["text"].double())
    table.apply(lambda tensor: tensor.to(dtype))
    assert torch.equal(table.at(torch.arange(40))["pooled"], whole["pooled"])


def test_the_least_recently_used_go_first_and_small_tables_make_no_file() -> None:
    table, whole = PromptTable(1), rows(5)
    table.add(list("abcd"), {name: tensor[:4] for name, tensor in whole.items()})
    assert table.on_disk == 0
    table.at(torch.tensor([1, 3]))
    table.at(torch.tensor([0, 2]))
    table.add(["e"], {name: tensor[4:] for name, tensor in whole.items()})
    assert table.kept == [3, 0, 2, 4]
    assert table.on_disk == 1
    assert torch.equal(table.at(torch.tensor([1, 0, 2, 4]))["text"], whole["text"][[1, 0, 2, 4]])
    assert table.kept == [0, 2, 4, 1], "what is asked for makes no room for another"
    with pytest.raises(sa.ModelError, match="prompt_memory is 0 MiB"):
        PromptTable(0)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError("No space left on device")

    table = PromptTable(1)
    table.reserve(8)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        sa.ModelError, match=r"embeddings of 8 prompts take 1 MiB, of which prompt_memory keeps 1, .*TMPDIR"
    ):
        table.add(list("abcdefgh"), rows(8))


def encoded(model: PipelineModel, prompts: list[str]) -> dict[str, torch.Tensor]:
    condition = model.condition(prompts)
    assert condition.rows is not None
    return model.family.table.at(condition.rows)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_an_embedding_is_the_same_whoever_asked_first(name: str) -> None:
    """Bit for bit, and diffusers' own of the prompt alone to rounding."""
    shuffle = random.Random(0)
    prompts = list(dict.fromkeys(" ".join(shuffle.choices(WORDS, k=shuffle.randint(1, 3))) for _ in range(30)))[:21]
    options = {"lora_rank": 2, **SIZES.get(name, {})}
    one, other = (pipeline_model(make(name, spelling_tokenizer()), **options) for _ in range(2))
    found = encoded(one, prompts)
    for part in (prompts[5:6], prompts[::-1][:11], prompts[2:9]):
        encoded(other, part)
    again = encoded(other, prompts)
    assert all(torch.equal(found[key], again[key]) for key in found)
    family = other.family
    alone = [family.encode([prompt], False) for prompt in prompts]
    for key in found:
        assert float((torch.cat([each[key] for each in alone]) - found[key]).abs().max()) < 1e-5
        assert float((found[key][0] - found[key][1]).abs().max()) > 1e-3


def test_scores_do_not_depend_on_where_the_embeddings_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS]
    model = pipeline_model(make("sdxl", spelling_tokenizer()), lora_rank=2, rows_per_call=4)
    monkeypatch.setattr(prompt_table, "MIB", 16 * 1024)
    small = pipeline_model(make("sdxl", spelling_tokenizer()), lora_rank=2, rows_per_call=4, prompt_memory=1)
    expected = model.score(*inputs(model, prompts))
    assert torch.equal(small.score(*inputs(small, prompts)), expected)
    assert small.family.table.on_disk > 50
    assert small.family.table.memory_bytes <= 16 * 1024
    (note,) = small.notes()
    assert note.startswith("The embeddings of 64 prompts take")
    assert "prompt_memory keeps 1 MiB on cpu, the others are in a temporary file" in note
    assert model.notes() == []


def test_prompts_that_are_too_long_are_counted() -> None:
    model = pipeline_model(make("sd", spelling_tokenizer()), lora_rank=2)  # sixteen letters at most, two of them marks
    model.condition(["a cat", "fourteenletter", "fifteensletters", "a cat", "many more than fifteen letters"])
    assert model.notes() == [
        "2 of 4 prompts are longer than the 16 tokens that the text encoder sees; their ends are cut off."
    ]


def test_text_encoders_are_on_the_device_only_while_they_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moves are noted and not made: there is no second device here. On one, `test_encoders_leave_the_gpu`."""
    model = pipeline_model(make("sdxl", spelling_tokenizer()), lora_rank=2)
    family, moves = model.family, []
    model.condition(["a cat"])
    place = dict.fromkeys(map(id, family.text_encoders()), "cpu")
    other = torch.device("meta")

    def put(device: torch.device) -> None:
        for encoder in family.text_encoders():
            if place[id(encoder)] != device.type:
                place[id(encoder)] = device.type
                moves.append(device.type)

    encode = family.encode

    def watched(prompts: Any, negative: bool) -> Any:
        assert set(place.values()) == {other.type}
        return encode(prompts, negative)

    monkeypatch.setattr(family, "put_text_encoders", lambda device: put(other if device == model.device else device))
    monkeypatch.setattr(type(family), "device", torch.device("cpu", 0))  # != cpu: the home
    monkeypatch.setattr(family, "encode", watched)
    model.condition(["two dogs", "a cat"])
    assert moves == ["meta", "meta", "cpu", "cpu"]
    model.condition(["two dogs"])
    assert len(moves) == 4, "known prompts need no encoder"
    with torch.no_grad():
        model.score(*inputs(model, ["a cat"]))
    assert moves[4:] == ["meta", "meta", "cpu", "cpu"], "the negative prompt"
    assert model.pipeline is family.pipeline
    assert set(place.values()) == {"meta"}, "whoever asks for the pipeline may call it"


@pytest.mark.gpu
def test_encoders_leave_the_gpu() -> None:
    model = pipeline_model(make("sd", spelling_tokenizer()), lora_rank=2).to("cuda")
    encoder, unet = model.family.pipeline.text_encoder, model.family.denoiser
    places = [next(module.parameters()).device.type for module in (encoder, unet)]
    assert places == ["cpu", "cuda"]
    assert model.family.table.at(model.condition(["a cat"]).rows)["text"].device.type == "cuda"
    assert next(encoder.parameters()).device.type == "cpu"
    assert next(model.pipeline.text_encoder.parameters()).device.type == "cuda"
