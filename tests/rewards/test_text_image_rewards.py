"""Text-image rewards on tiny random networks: formulas by hand, preprocessing against transformers', layouts there and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from scoreact import rewards as rw
from scoreact.cli import main as cli
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.network import NetworkModel
from scoreact.rewards import ocr as reading
from scoreact.rewards import published_weights as convert
from scoreact.rewards import text_image
from scoreact.rewards.image import pictures
from scoreact.training.assembly import check_differentiable
from scoreact.types import Condition

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from tiny_pipelines import spelling_tokenizer  # noqa: E402

SIDE = 28  # pixels that the tiny networks look at; patches of 14
PROMPTS = ["a cat", "two dogs", "a cat", "red", "a red cat"]
CONDITION = Condition(PROMPTS)


def smooth(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Pictures of a few slow waves, rounded to 8 bits as files are: [count, channels, height, width]."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    waves = torch.zeros(count, channels, height, width)
    for _ in range(4):
        a, b, phase = torch.rand(3, count, channels, 1, 1, generator=generator) * torch.tensor([9, 9, 6.3]).reshape(
            3, 1, 1, 1, 1
        )
        waves += torch.sin(a * x + b * y + phase) / 8
    return ((waves + 0.5) * 255).round() / 255


IMAGES = smooth(5, 40, 40)


# --- tiny networks ----------------------------------------------------------------------------------------------------


def shaken(network: Any) -> Any:
    """The same weights each time, of spread 0.3 so that pictures and prompts make a difference; frozen, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name != "logit_scale":
            usual = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.data = usual + 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return spelling_tokenizer()


@pytest.fixture(scope="session")
def clip(tokenizer: Any) -> Any:
    """A CLIPModel of the HPSv2 kind: GELU, 16 heads in both towers, pooled at the end token, which is the last word."""
    tower: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 16, "hidden_act": "gelu"}
    words = len(tokenizer)
    config = transformers.CLIPConfig(
        projection_dim=24,
        text_config={
            **tower, "vocab_size": words, "hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": 16,
            "bos_token_id": words - 2, "eos_token_id": words - 1,
        },
        vision_config={**tower, "hidden_size": 48, "intermediate_size": 56, "image_size": SIDE, "patch_size": 14},
    )  # fmt: skip
    return shaken(transformers.CLIPModel(config))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: Any, tokenizer: Any) -> str:
    """`clip` and `tokenizer` as `from_pretrained` finds them."""
    path = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def blip() -> tuple[Any, Any, nn.Sequential]:
    """Vision tower, text tower and head of an ImageReward with the published numbers of heads, 16 and 12."""
    vision = transformers.BlipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=16, image_size=SIDE, patch_size=14,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    text = transformers.BlipTextConfig(
        vocab_size=60, hidden_size=24, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=12, max_position_embeddings=40, is_decoder=True,
    )  # fmt: skip
    text_tower = transformers.BlipTextModel(text, add_pooling_layer=False)
    return shaken(transformers.BlipVisionModel(vision)), shaken(text_tower), convert.linear_head(head_weights(24))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT tokenizer of few words."""
    path = tmp_path_factory.mktemp("words")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "red"]
    (path / "vocab.txt").write_text("\n".join(known))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return str(path)


def head_weights(width: int) -> dict[str, Tensor]:
    """The published head's layout: linear layers 0, 2, 4, 6 and 7 of a sequence whose others are dropout."""
    generator = torch.Generator().manual_seed(1)
    sizes = [width, 20, 12, 8, 4, 1]
    weights = {}
    for n, rows, columns in zip([0, 2, 4, 6, 7], sizes[1:], sizes[:-1], strict=True):
        weights[f"layers.{n}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        weights[f"layers.{n}.bias"] = torch.randn(rows, generator=generator)
    return weights


# --- original layouts, written from transformers' models ---------------------------------------------------------------


def open_clip_of(model: Any) -> dict[str, Tensor]:
    """transformers' CLIP in open_clip's names: in_proj is q, k, v one above the other, the projections are transposed."""
    state = model.state_dict()
    found = {
        "logit_scale": state["logit_scale"],
        "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for prefix, tower in (("visual.", "vision"), ("", "text")):
            for n in range(2):
                theirs, ours = f"{prefix}transformer.resblocks.{n}", f"{tower}_model.encoder.layers.{n}"
                q, k, v = (state[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv")
                found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat([q, k, v])
                found[f"{theirs}.attn.out_proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
                found[f"{theirs}.ln_1.{kind}"] = state[f"{ours}.layer_norm1.{kind}"]
                found[f"{theirs}.ln_2.{kind}"] = state[f"{ours}.layer_norm2.{kind}"]
                found[f"{theirs}.mlp.c_fc.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
                found[f"{theirs}.mlp.c_proj.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
    return {name: value.contiguous() for name, value in found.items()}


def imagereward_of(vision: Any, text: Any) -> dict[str, Tensor]:
    """transformers' BLIP towers, and a head, in the names of ImageReward.pt."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
    }
    found = {}
    for name, value in vision.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[f"blip.visual_encoder.{name}"] = value
    found |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    found |= {f"mlp.{name}": value for name, value in head_weights(text.config.hidden_size).items()}
    unused = {"blip.vision_proj.weight": torch.ones(2, 2), "blip.text_proj.bias": torch.ones(2)}
    return {**found, **unused, "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


class OpenClipBlock(nn.Module):
    """A residual block as open_clip builds it, on torch's own attention."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 16, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def open_clip_features(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1 by open_clip's forward pass: torch's attention, pooled at the largest id."""

    def blocks(x: Tensor, prefix: str, mask: Tensor | None = None) -> Tensor:
        for n in range(2):
            start = f"{prefix}transformer.resblocks.{n}."
            own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
            block = OpenClipBlock(x.shape[-1], len(own["mlp.c_fc.bias"]))
            block.load_state_dict(own)
            x = block.eval()(x, mask)
        return x

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = F.conv2d(pixels, weights["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = blocks(norm(x + weights["visual.positional_embedding"], "visual.ln_pre"), "visual.")
    images = norm(x[:, 0], "visual.ln_post") @ weights["visual.proj"]
    causal = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
    x = blocks(weights["token_embedding.weight"][ids] + weights["positional_embedding"], "", causal)
    texts = norm(x, "ln_final")[torch.arange(len(ids)), ids.argmax(1)] @ weights["text_projection"]
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def clip_processor() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


# --- preprocessing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(100, 100), (64, 90), (90, 61), (28, 28), (20, 24), (28, 41)])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_the_processors_up_to_its_rounding(shape: tuple[int, int], channels: int) -> None:
    images = smooth(3, *shape, channels)
    processor = clip_processor()
    expected = processor(pictures(images), return_tensors="pt").pixel_values
    found = text_image.preprocess(images, SIDE)
    assert found.shape == (3, 3, SIDE, SIDE)
    # Pillow rounds to 8 bits after each of its two passes; the second one's weights sum to at most 1.25 in size
    assert (found - expected).abs().max() < (0.5 * 1.25 + 0.5) / 255 / min(text_image.STD)
    assert (found - expected).abs().mean() < 0.4 / 255 / min(text_image.STD)


def test_preprocessing_by_hand_and_its_gradient() -> None:
    red = torch.tensor([1.0, 0.0, 0.5]).reshape(1, 3, 1, 1).expand(1, 3, 50, 40)
    found = text_image.preprocess(red, SIDE)[0, :, 5, 9].tolist()
    assert found == pytest.approx([(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, 0.33288], abs=1e-4)
    x = torch.rand(2, 3, 30, 36, requires_grad=True)
    weights = torch.rand(2, 3, SIDE, SIDE)
    (gradient,) = torch.autograd.grad((weights * text_image.preprocess(x, SIDE)).sum(), x)
    step = torch.rand(2, 3, 30, 36)
    change = (weights * (text_image.preprocess(x + step, SIDE) - text_image.preprocess(x, SIDE))).sum()
    assert change.item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)  # it is affine


# --- formulas -----------------------------------------------------------------------------------------------------------


def load(name: str, folder: str, **options: Any) -> Any:
    return rw.load(name, path=folder, **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("clip", {}, [60.0, 0.0]),
        ("clip", {"weight": 2.5}, [1.5, 0.0]),
        ("pickscore", {}, [12.0, -16.0]),
        ("hps", {}, [0.6, -0.8]),
    ],
)
def test_cosine_rewards_by_hand(
    name: str, options: dict[str, float], expected: list[float], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures at (3, 4) and (0, -2), prompts at (2, 0) and (0, 9): cosines 0.6 and -1; made -0.8 by (3, -4)."""
    reward = load(name, folder, **options)
    monkeypatch.setattr(reward.model, "get_image_features", lambda pixels: torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
    monkeypatch.setattr(reward.model, "get_text_features", lambda **tokens: torch.tensor([[2.0, 0.0], [0.0, 9.0]]))
    reward.model.logit_scale.fill_(math.log(20.0))
    found = reward(IMAGES[:2], Condition(["a cat", "two dogs"]))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_cosine_rewards_against_transformers_own_forward(folder: str, clip: Any, tokenizer: Any) -> None:
    """CLIPModel.forward gives exp(logit_scale) cos for every pair; pictures through the PIL processor."""
    processor = clip_processor()
    images = smooth(5, SIDE, SIDE)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = processor(pictures(images), return_tensors="pt").pixel_values
    pairs = clip(**inputs, pixel_values=pixels).logits_per_image.diagonal()
    scale = clip.logit_scale.exp()
    assert torch.allclose(load("pickscore", folder)(images, CONDITION), pairs, rtol=1e-3, atol=1e-3)
    assert torch.allclose(load("hps", folder)(images, CONDITION), pairs / scale, rtol=1e-3, atol=1e-4)
    assert torch.allclose(
        load("clip", folder)(images, CONDITION), 100 * (pairs / scale).clamp_min(0), rtol=1e-3, atol=1e-2
    )
    assert (pairs / scale).std() > 0.05  # else they would agree whatever the pictures


def test_aesthetic_by_hand(folder: str, clip: Any, tmp_path: Path) -> None:
    """Five affine maps one after another, in float64, on the embedding divided by its length."""
    weights = head_weights(24)
    torch.save(weights, tmp_path / "head.pth")
    reward = load("aesthetic", folder, head=str(tmp_path / "head.pth"))
    x = clip.get_image_features(text_image.preprocess(IMAGES, SIDE))
    x = (x if isinstance(x, Tensor) else x.pooler_output).double()
    x = x / x.square().sum(1, keepdim=True).sqrt()
    for n in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{n}.weight"].double().T + weights[f"layers.{n}.bias"].double()
    found = reward(IMAGES, CONDITION)
    assert found.tolist() == pytest.approx(x[:, 0].tolist(), rel=1e-4)
    assert found.std() > 0.01
    save_file(weights, tmp_path / "aesthetic-model.safetensors")
    again = load("aesthetic", folder, head=str(tmp_path), file="aesthetic-model.safetensors")
    assert torch.equal(again(IMAGES, CONDITION), found)


def test_imagereward_by_hand(blip: Any, words: str, tmp_path: Path) -> None:
    """(m - 0.16717362830052426) / 1.0333394966054072 of the first token, each prompt alone and without padding."""
    vision, text, head = blip
    torch.save(imagereward_of(vision, text), tmp_path / "ImageReward.pt")
    reward = rw.load("imagereward", path=str(tmp_path), tokenizer=words)
    ids = {"a cat": [2, 5, 6, 3], "two dogs": [2, 7, 8, 3], "red": [2, 9, 3], "a red cat": [2, 5, 9, 6, 3]}
    seen = vision(text_image.preprocess(IMAGES, SIDE)).last_hidden_state
    expected = []
    for i, prompt in enumerate(PROMPTS):
        states = text(torch.tensor([ids[prompt]]), encoder_hidden_states=seen[i : i + 1], is_decoder=False)
        m = head(states.last_hidden_state[0, 0])
        expected.append((m.item() - 0.16717362830052426) / 1.0333394966054072)
    assert reward(IMAGES, CONDITION).tolist() == pytest.approx(expected, rel=1e-4)
    other = reward(IMAGES, Condition(PROMPTS[1:] + PROMPTS[:1]))
    assert (other - torch.tensor(expected)).abs().max() > 0.01  # the prompt counts


# --- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_hps_in_open_clips_layout_scores_as_before(
    suffix: str, folder: str, clip: Any, tokenizer: Any, tmp_path: Path
) -> None:
    weights = open_clip_of(clip)
    if suffix == "pt":
        older = {**weights, "attn_mask": torch.ones(16, 16)}
        torch.save({"state_dict": older, "epoch": torch.tensor(3)}, tmp_path / "HPS_v2.1_compressed.pt")
    else:
        save_file(weights, tmp_path / "hps.safetensors")
    place = tmp_path if suffix == "pt" else tmp_path / "hps.safetensors"
    before = load("hps", folder)(IMAGES, CONDITION)
    reward = rw.load("hps", path=str(place), tokenizer=folder)
    assert torch.allclose(reward(IMAGES, CONDITION), before, rtol=0, atol=1e-6)
    # and as open_clip itself would: its own forward pass on its own tensors
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    images, texts = open_clip_features(weights, text_image.preprocess(IMAGES, SIDE), ids)
    assert torch.allclose((images * texts).sum(1), before, rtol=0, atol=1e-5)
    # converted once and saved, it is an ordinary CLIPModel
    convert.clip_from_open_clip(weights).save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    assert torch.equal(load("hps", str(tmp_path / "converted"))(IMAGES, CONDITION), reward(IMAGES, CONDITION))


def test_imagereward_layout_gives_every_tensor_back(blip: Any) -> None:
    vision, text, head = convert.imagereward_from_blip(imagereward_of(*blip[:2]))
    for found, given in zip((vision, text, head), blip, strict=True):
        assert found.state_dict().keys() == given.state_dict().keys()
        for name, value in given.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
    assert vision.config.layer_norm_eps == 1e-6
    pixels = text_image.preprocess(IMAGES, SIDE)
    assert torch.equal(vision(pixels).last_hidden_state, blip[0](pixels).last_hidden_state)


def test_converting_leaves_the_global_generator_alone(clip: Any, blip: Any) -> None:
    before = torch.get_rng_state()
    convert.clip_from_open_clip(open_clip_of(clip))
    convert.imagereward_from_blip(imagereward_of(*blip[:2]))
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_layouts_are_told(clip: Any, blip: Any, tmp_path: Path) -> None:
    weights = open_clip_of(clip)
    lacking = {name: value for name, value in weights.items() if name != "ln_final.bias"}
    with pytest.raises(ValueError, match=r"not those of an open_clip CLIP: missing keys text_model.final_layer_norm"):
        convert.clip_from_open_clip(lacking)
    with pytest.raises(ValueError, match=r"unexpected keys visual.extra"):
        convert.clip_from_open_clip({**weights, "visual.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"mismatched keys .*text_model.final_layer_norm.bias.*\[5\]"):
        convert.clip_from_open_clip({**weights, "ln_final.bias": torch.ones(5)})
    with pytest.raises(ValueError, match=r"hold no visual.conv1.weight but .*; they are of another layout"):
        convert.clip_from_open_clip(imagereward_of(*blip[:2]))
    with pytest.raises(ValueError, match=r"hold no embeddings.patch_embedding.weight but nothing"):
        convert.imagereward_from_blip(weights)
    with pytest.raises(ValueError, match=r"the head holds nothing; expected layers.N.weight"):
        convert.linear_head({})
    with pytest.raises(ValueError, match=r"the head holds layers.0.bias, .*, other; expected layers.N.weight"):
        convert.linear_head({**head_weights(24), "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"layers.2.weight of the head has shape \(12, 21\)"):
        convert.linear_head({**head_weights(24), "layers.2.weight": torch.ones(12, 21)})
    torch.save({"weights": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors by name; save the model's `state_dict\(\)` alone"):
        convert.read_weights(tmp_path / "list.pt")
    torch.save(Path("x"), tmp_path / "code.pt")  # an object: reading it would run its constructor
    with pytest.raises(ValueError, match=r"code.pt is no file of tensors"):
        convert.read_weights(tmp_path / "code.pt")


# --- what all of them promise --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def places(folder: str, blip: Any, words: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Options that find tiny weights for each differentiable reward."""
    path = tmp_path_factory.mktemp("weights")
    torch.save(imagereward_of(*blip[:2]), path / "ImageReward.pt")
    save_file(head_weights(24), path / "head.safetensors")
    cosine = {"path": folder}
    return {
        "clip": cosine, "pickscore": cosine, "hps": cosine,
        "aesthetic": {"path": folder, "head": str(path / "head.safetensors")},
        "imagereward": {"path": str(path), "tokenizer": words},
    }  # fmt: skip


NAMES = ["clip", "pickscore", "hps", "aesthetic", "imagereward"]


@pytest.mark.parametrize("name", NAMES)
def test_reward_keeps_its_promises(name: str, places: dict[str, dict[str, str]]) -> None:
    """Fine by `explain` (shape, repeatability, no dependence on the batch, gradient), in parts as in one, in bfloat16 too."""
    lines = rw.explain(name, IMAGES, CONDITION, needs_gradient=True, **places[name])
    assert lines[-1].startswith("fine: "), lines
    reward: Any = rw.load(name, **places[name])
    whole = reward(IMAGES, CONDITION)
    assert whole.dtype == torch.float32
    assert reward(IMAGES.double(), CONDITION).dtype == torch.float64
    assert torch.allclose(rw.load(name, **places[name], batch_size=2)(IMAGES, CONDITION), whole, rtol=1e-4, atol=1e-4)
    smaller: Any = rw.load(name, **places[name], dtype="bfloat16")
    half = smaller(IMAGES, CONDITION)
    assert half.dtype == torch.float32
    assert {p.dtype for p in smaller.networks[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in smaller.networks[1:].parameters()} <= {torch.float32}  # the head, where there is one
    assert torch.allclose(half, whole, rtol=0.1, atol=0.1 * float(whole.abs().max()))
    assert not torch.equal(half, whole)
    assert not any(module.training for module in reward.networks.modules())
    assert not any(parameter.requires_grad for parameter in reward.networks.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_pixels(name: str, places: dict[str, dict[str, str]]) -> None:
    """Along a slow wave the gradient is the finite difference, a part of 2 as well as the whole."""
    reward = rw.load(name, **places[name], batch_size=2)
    images = smooth(5, SIDE, SIDE).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, CONDITION).sum(), images)
    step = 1e-3 * (smooth(5, SIDE, SIDE).flip(0) - 0.5)
    with torch.no_grad():
        change = (reward(images + step, CONDITION) - reward(images - step, CONDITION)) / 2
    along = (gradient * step).sum((1, 2, 3))
    assert torch.allclose(along, change, rtol=0.01, atol=0.005 * float(change.abs().max()))
    assert change.abs().max() > 1e-6


class Moving(nn.Module):
    """A velocity field with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.rate * x


def test_rules_that_need_a_gradient_accept_them(places: dict[str, dict[str, str]]) -> None:
    model = NetworkModel(Moving(), RectifiedFlow(), prediction.velocity, (3, SIDE, SIDE), ["a cat"], low=-1, high=1)
    reward = rw.checked(rw.load("clip", **places["clip"]))
    check_differentiable("draft", model, reward, ["a cat"])
    with pytest.raises(ValueError, match="but reward ocr has none"):
        check_differentiable("draft", model, rw.checked(rw.OCR(lambda images: ["a"] * len(images))), ["a cat"])


def test_a_prompt_is_tokenised_once(places: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clip", "imagereward"):
        reward: Any = rw.load(name, **places[name])
        asked: list[str] = []
        real = reward.tokenizer

        def spy(prompts: list[str], real: Any = real, asked: list[str] = asked, **options: Any) -> Any:
            asked.extend(prompts)
            return real(prompts, **options)

        monkeypatch.setattr(reward, "tokenizer", spy)
        first = reward(IMAGES, CONDITION)
        assert torch.equal(reward(IMAGES, CONDITION), first)
        assert asked == ["a cat", "two dogs", "red", "a red cat"]


def test_long_prompts_are_cut(places: dict[str, dict[str, str]]) -> None:
    for name in ("clip", "imagereward"):
        reward = rw.load(name, **places[name])
        long = reward(IMAGES[:2], Condition([" ".join(["cat"] * 60), " ".join(["cat"] * 61)]))
        assert bool(long.isfinite().all())


# --- sentences ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "clip",
            {"path": "./nowhere"},
            r"reward clip found no weights at './nowhere': .*Give a folder, a file or a hub id",
        ),
        (
            "pickscore",
            {},
            r"reward pickscore found no weights at 'yuvalkirstain/PickScore_v1': .* as the option path\.",
        ),
        ("hps", {"file": "x.pt"}, r"reward hps found no weights at 'xswu/HPSv2': .* as the option path\."),
        ("imagereward", {"path": "{empty}"}, r"no weights at '.*': the folder holds no ImageReward.pt\. Give a folder"),
        (
            "aesthetic",
            {"head": "{empty}"},
            r"reward aesthetic .* the folder holds no aesthetic-model.pth.* option head\.",
        ),
        ("clip", {"path": "{folder}", "tokenizer": "{empty}"}, r"cannot be read from .* as the option tokenizer\."),
        ("clip", {"path": "{folder}", "dtype": "half"}, r"dtype is 'half'; known: float32, float16, bfloat16"),
        ("clip", {"path": "{folder}", "batch_size": 0}, r"batch_size is 0; give a whole number of at least 1"),
        (
            "aesthetic",
            {"path": "{folder}", "head": "{wide}"},
            r"head takes 30 numbers, but '.*' gives 24; give the CLIP",
        ),
        (
            "vqa",
            {"path": "{folder}"},
            r"reward vqa: AutoProcessor cannot be read from '.*' .* option path\.",
        ),
        ("vqa", {"path": "{empty}"}, r"reward vqa found no weights at '.*': the folder holds no config.json\."),
        ("vqa", {"question": "is it red?"}, r"question 'is it red\?' lacks the place of the prompt; write {} there"),
        ("ocr", {"reader": "no.py:read"}, r"'no.py' does not exist"),
    ],
)
def test_what_is_missing_is_said(name: str, options: dict[str, Any], message: str, folder: str, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE, set for all tests, stands for a machine without a network."""
    save_file(head_weights(30), tmp_path / "wide.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    at = {"{empty}": str(empty), "{folder}": folder, "{wide}": str(tmp_path / "wide.safetensors")}
    with pytest.raises(ValueError, match=message) as caught:
        rw.load(name, **{option: at.get(value, value) for option, value in options.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES[:3] + NAMES[4:] + ["vqa"])
def test_the_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers \(.*\); pip install 'scoreact\[diffusers\]'"):
        rw.load(name)


def test_check_reward_on_the_command_line(
    places: dict[str, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "reward", "clip", "--option", "path=./nowhere"]) == 1
    assert "problem: reward clip found no weights at './nowhere'" in capsys.readouterr().out
    command = ["check", "reward", "hps", "--recipe", "plain", "--samples", "4", "--gradient", "--option"]
    found = cli.main([*command, f"path={places['hps']['path']}"])
    assert "fine: reward hps" in capsys.readouterr().out
    assert found == 0


# --- yes or no ----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT{% endif %}"
)


SMALL = smooth(5, SIDE, SIDE)  # nothing to resize, so the processors round nothing
WORDS = ["<pad>", "<unk>", "<image>", "Yes", "No", "ASSISTANT", "show", "a", "cat", "two", "dogs", "red", "?"]
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def word_tokenizer(**special: Any) -> Any:
    """A token a word of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    spelled = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", unk_token="<unk>", **special
    )


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny LLaVA and its processor."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=14),
        text_config=transformers.LlamaConfig(**TOWER, vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0),
        image_token_id=2, vision_feature_layer=-1,
    )  # fmt: skip
    image_token = {"additional_special_tokens": ["<image>"], "extra_special_tokens": {"image_token": "<image>"}}
    processor = transformers.LlavaProcessor(
        clip_processor(), word_tokenizer(**image_token), patch_size=14, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llava")
    shaken(transformers.LlavaForConditionalGeneration(config)).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def test_vqa_is_the_next_tokens_probability(llava: str) -> None:
    """Each picture alone, ids written out: <image> four times, the question, ASSISTANT; then the share of Yes (3)."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava).eval()
    expected = []
    for image, prompt in zip(SMALL, PROMPTS, strict=True):
        ids = [2] * 4 + [WORDS.index(word) for word in ["show", *prompt.split(), "?", "ASSISTANT"]]
        pixels = text_image.preprocess(image[None], SIDE)
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].double()
        expected.append((logits[3].item(), logits[4].item(), logits.logsumexp(0).item()))
    question = {"question": "show {} ?"}
    plain: Any = load("vqa", llava, **question)
    found = plain(SMALL, CONDITION)
    assert found.tolist() == pytest.approx([math.exp(y - z) for y, _, z in expected], rel=1e-4)
    assert found.std() > 0.01
    logs = load("vqa", llava, **question, log=True, batch_size=2)(SMALL, CONDITION)
    assert torch.allclose(logs.exp(), found, rtol=1e-4)
    odds = load("vqa", llava, **question, against="No")(SMALL, CONDITION)
    assert odds.tolist() == pytest.approx([1 / (1 + math.exp(n - y)) for y, n, _ in expected], rel=1e-4)
    assert load("vqa", llava, **question, answer="No", against="Yes")(SMALL, CONDITION).tolist() == pytest.approx(
        (1 - odds).tolist(), abs=1e-5
    )
    with pytest.raises(ValueError, match="'Yes' and 'Yes' begin with the same token"):
        load("vqa", llava, against="Yes")


def test_vqa_of_an_encoder_decoder(tmp_path: Path) -> None:
    """BLIP-2 with T5: the first token after the decoder's start, of each picture alone."""
    config = transformers.Blip2Config(
        vision_config={**TOWER, "image_size": SIDE, "patch_size": 14},
        qformer_config={**TOWER, "encoder_hidden_size": 16, "vocab_size": len(WORDS)},
        text_config={
            "model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2,
            "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0,
        },
        num_query_tokens=4, image_token_index=2,
    )  # fmt: skip
    model = shaken(transformers.Blip2ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    look = transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    transformers.Blip2Processor(look, word_tokenizer(eos_token="<unk>"), num_query_tokens=4).save_pretrained(tmp_path)
    expected = []
    for image, prompt in zip(SMALL, PROMPTS, strict=True):
        ids = torch.tensor([[2] * 4 + [WORDS.index(word) for word in ["show", *prompt.split(), "?"]]])
        pixels = text_image.preprocess(image[None], SIDE)
        logits = model(input_ids=ids, pixel_values=pixels, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
        expected.append(float(logits[0, 0].softmax(-1)[3]))
    found = load("vqa", str(tmp_path), question="show {} ?")(SMALL, CONDITION)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.std() > 0.01


def test_vqa_without_a_chat_template_and_as_a_reward(llava: str) -> None:
    reward: Any = load("vqa", llava, question="<image> show {} ? ASSISTANT")
    templated = load("vqa", llava, question="show {} ?")(SMALL, CONDITION)
    reward.processor.chat_template = None
    assert torch.allclose(reward(SMALL, CONDITION), templated, rtol=1e-5)
    lines = rw.explain("vqa", SMALL, CONDITION, path=llava)
    assert lines[-1].startswith("fine: "), lines
    assert not rw.is_differentiable(reward)


# --- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("the sign: HEL LO!", "hello", 1.0),  # part of what is read
        ("helo", "hello", 0.8),  # one letter is missing
        ("yellow", "hello", 0.6),  # y for h, and a w
        ("", "hello", 0.0),
        ("a very long text about nothing", "open", 0.0),  # more mistakes than letters count as that many
    ],
)
def test_accuracy_of_a_text_by_hand(read: str, target: str, expected: float) -> None:
    assert reading.accuracy(read, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("ab", "ba", 2),
        ("x", "x", 0),
    ],
)
def test_levenshtein_by_hand(a: str, b: str, distance: int) -> None:
    assert reading.levenshtein(a, b) == reading.levenshtein(b, a) == distance


def test_pictures_are_clipped_and_rounded() -> None:
    values = torch.tensor([-0.1, 0.4, 0.6, 254.4, 300.0]) / 255
    grey = pictures(values.reshape(1, 1, 1, 5))[0]
    assert grey.size == (5, 1)
    assert [grey.getpixel((x, 0)) for x in range(5)] == [(0,) * 3, (0,) * 3, (1,) * 3, (254,) * 3, (255,) * 3]
    colour = pictures(torch.tensor([0.2, 0.4, 1.0]).reshape(1, 3, 1, 1))[0]
    assert colour.getpixel((0, 0)) == (51, 102, 255)


def test_ocr_with_a_reader_in_a_file(tmp_path: Path) -> None:
    """A reader that knows two colours; the text stands between the first two quotes."""
    file = tmp_path / "reader.py"
    file.write_text(
        "def read(images):\n    return ['open' if x.getpixel((0, 0)) == (255, 0, 0) else 'oven' for x in images]\n"
    )
    reward = rw.load("ocr", reader=f"{file}:read")
    images = torch.zeros(3, 3, 8, 8)
    images[0, 0] = 1
    condition = Condition(['a "Open" sign', 'a "O P E N" door "shut"', 'an "oven"'])
    assert reward(images, condition).tolist() == pytest.approx([1.0, 0.75, 1.0])
    assert not rw.is_differentiable(reward)


def one(images: list[Image.Image]) -> list[str]:
    return ["open"]


@pytest.mark.parametrize(
    ("reader", "prompt", "message"),
    [
        (one, "a door", r"prompt 'a door' has no text in double quotes; write it as"),
        (one, 'a " "', r"has no text in double quotes"),
        (lambda images: "open", 'a "b"', r"returned 'open' for 1 pictures; give one string each"),
        (lambda images: ["open", "x"], 'a "b"', r"returned \['open', 'x'\] for 1 pictures"),
    ],
)
def test_ocr_errors(reader: Callable[..., Any], prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rw.OCR(reader)(IMAGES[:1], Condition([prompt]))
