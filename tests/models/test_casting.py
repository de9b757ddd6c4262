"""Layerwise casting: half-precision weights computed with in float32 give what the same weights in float32 give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from tiny_pipelines import SIZES, inputs, make, move, spelling_tokenizer, theirs  # noqa: E402

from scoreact.models.pipelines import casting  # noqa: E402
from scoreact.models.pipelines.model import PipelineModel  # noqa: E402
from scoreact.models.pipelines.opening import pipeline_model  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]


def opened(name: str, dtype: torch.dtype, **options: Any) -> PipelineModel:
    model = pipeline_model(
        make(name, spelling_tokenizer()), dtype=dtype, lora_rank=4, **{**SIZES.get(name, {}), **options}
    )
    move(model)
    return model


def score_and_gradients(model: PipelineModel) -> list[Tensor]:
    t, x, condition = inputs(model)
    x.requires_grad_(True)
    score = model.score(t, x, condition)
    return [score.detach(), *torch.autograd.grad(score.square().mean(), [x, *model.parameters()])]


def far(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in units of what is expected."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("sd", False), ("sd", True), ("sdxl", False), ("sd3", False), ("sd3", True), ("flux_guided", False)],
)
def test_scores_and_gradients_are_those_of_the_same_weights_in_float32(name: str, checkpointing: bool) -> None:
    model = opened(name, torch.bfloat16, gradient_checkpointing=checkpointing)
    assert model.family.dtype == torch.bfloat16
    found = score_and_gradients(model)
    model.family.denoiser.float()
    expected = score_and_gradients(model)
    assert max(map(far, found, expected)) < 1e-4
    assert far(found[0], expected[0]) < 1e-5
    rounded = score_and_gradients(
        opened(name, torch.bfloat16, compute_dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
    )
    assert far(rounded[0], expected[0]) > 1e-3
    assert max(map(far, rounded, expected)) > 1e-2


@pytest.mark.parametrize("name", ["wan", "ddpm"])
def test_so_where_the_network_itself_rounds_the_embedding_of_its_time(name: str) -> None:
    """Which is the same for policy and reference: only a state and a weight must not be rounded."""
    model = opened(name, torch.bfloat16)
    found = score_and_gradients(model)
    model.family.denoiser.float()
    assert max(map(far, found, score_and_gradients(model))) < 1e-2


@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_pass_keeps_no_float32_copy_of_a_weight(dtype: torch.dtype) -> None:
    model = opened("sd", dtype)
    t, x, condition = inputs(model)
    frozen = [
        m
        for m in model.family.denoiser.modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not m.weight.requires_grad
    ]
    shapes = {tuple(m.weight.shape) for m in frozen}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.score(t, x, condition)
    of_weights = [tensor for tensor in kept if tuple(tensor.shape) in shapes]
    assert len(of_weights) >= len(shapes)
    assert {tensor.dtype for tensor in of_weights if tensor.ndim == 4 and tensor.shape[2:] == (3, 3)} == {dtype}


def test_the_pipeline_stays_what_it_was_in_plain_diffusers(tmp_path: Path) -> None:
    """Opened, trained and drawn with as before; saved in the dtype that it was stored in."""
    plain = make("sd", spelling_tokenizer()).to(dtype=torch.bfloat16)
    model = pipeline_model(make("sd", spelling_tokenizer()), dtype=torch.bfloat16, lora_rank=4, vae_slicing=False)
    x = inputs(model)[1].bfloat16()
    assert torch.equal(theirs("sd", model.pipeline, x, 2), theirs("sd", plain, x, 2))
    move(model)
    model.save(tmp_path, "pipeline")
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {p.dtype for p in stored.values()} == {torch.bfloat16}
    assert stored.keys() == plain.unet.state_dict().keys()


def test_another_dtype_than_the_weights_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute_dtype is torch.float16, but the weights are torch.bfloat16"):
        opened("sd", torch.bfloat16, compute_dtype=torch.float16)


# --- float32 on tensor cores ---------------------------------------------------------------------------------------------


def tf32(x: Tensor) -> Tensor:
    """Rounded to TF32's 11 bits."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_products_of_tf32_in_parts_are_float32s(dtype: torch.dtype, generator: torch.Generator) -> None:
    """On factors that are rounded as tensor cores round them, against float64; one product alone keeps 11 bits."""
    x = torch.randn(64, 512, generator=generator) * torch.exp(3 * torch.randn(64, 512, generator=generator))
    weight, bias = torch.randn(32, 512, generator=generator).to(dtype), torch.randn(32, generator=generator)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = tf32(x).double() @ tf32(weight).double().T
        return (found if bias is None else found + bias).float()

    exact = x.double() @ weight.double().T + bias
    assert far(casting.in_two_parts(product, x, weight, bias), exact) < 2**-21
    assert far(product(x, weight.float(), bias), exact) > 2**-14


def test_the_two_parts_make_the_whole(generator: torch.Generator) -> None:
    x = torch.randn(10_000, generator=generator) * torch.exp(10 * torch.randn(10_000, generator=generator))
    high, low = casting.parts(x)
    assert torch.equal(high + low, x)
    assert torch.equal(tf32(high), high)
    assert bool((low.abs() <= x.abs() / 1024).all())


@pytest.mark.gpu
def test_on_a_gpu_products_are_float32s_and_the_switches_are_put_back() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 64, 32, 32, generator=generator, device="cuda")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    layers: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
        (nn.Conv2d(64, 64, 3, padding=1), lambda x: x), (nn.Linear(64, 64), lambda x: x.movedim(1, -1)),
    ]  # fmt: skip
    for layer, of in layers:
        for dtype in (*HALVES, torch.float32):
            layer.to("cuda", dtype).requires_grad_(False)
            casting.compute_in_float32(layer)
            exact = type(layer).forward(layer.double(), of(x).double()).float()  # type: ignore[arg-type]
            assert far(layer.to(dtype)(of(x)), exact) < 4e-6  # 1.2e-6 on an H100; TF32 has 1e-4
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
