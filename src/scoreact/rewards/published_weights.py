"""Published reward weights in their authors' layouts, as transformers models.

Knows layouts only: open_clip's CLIP (HPSv2 and HPSv2.1 are published so; mlfoundations/open_clip, `model.py` and
`transformer.py`), ImageReward's BLIP (THUDM/ImageReward, `ImageReward.py`, `models/BLIP/vit.py`, `med.py`) and the linear
heads of improved-aesthetic-predictor and ImageReward. Sizes are read from the tensors; numbers of heads cannot be, and
are those of the published models unless given. Files are read without executing anything in them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import RewardError

Weights = dict[str, Tensor]

HPS_HEADS = 16  # ViT-H-14.json: vision 1280 wide, 80 a head; text 1024 wide, 16 heads
BLIP_VISION_HEADS = 16  # ViT-L/16, `create_vit`
BLIP_TEXT_HEADS = 12  # med_config.json; transformers' default is 8

_OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_weights(path: Path) -> Weights:
    """The tensors of a .safetensors file, or of a torch file read with weights_only (nothing in it is executed).

    A torch file may hold them under `state_dict` or `model`. Raises ValueError for a file that holds anything else.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RewardError(
            f"{path} is no file of tensors ({shorten(str(error), 160)}). Give a .safetensors, .pt or .pth of them."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RewardError(f"{path} holds more than tensors by name; save the model's `state_dict()` alone.")
    return dict(content)


def clip_from_open_clip(weights: Weights, vision_heads: int = HPS_HEADS, text_heads: int = HPS_HEADS) -> Any:
    """open_clip's `CLIP` with GELU (ViT-H-14, so HPSv2 and HPSv2.1) as a transformers `CLIPModel`.

    Each block's attn.in_proj [3 d, d] is q, k, v one above the other; the two projections are stored transposed.
    Raises ValueError naming tensors that are missing or unknown.
    """
    from transformers import CLIPConfig, CLIPModel

    found: Weights = {}
    for name, value in weights.items():
        tower, inside, block = name.partition("transformer.resblocks.")
        if inside:
            number, _, rest = block.partition(".")
            module, _, kind = rest.rpartition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.clone()  # not views of one storage
            else:
                found[f"{layer}.{_OPEN_CLIP_BLOCK.get(module, module)}.{kind}"] = value
        elif name != "attn_mask":  # the causal mask, which older versions stored
            projection = name in ("visual.proj", "text_projection")
            found[_OPEN_CLIP.get(name, name)] = value.T.contiguous() if projection else value
    _need(weights, ["visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "visual.proj"])
    patches, patch = weights["visual.conv1.weight"], weights["visual.conv1.weight"].shape[-1]
    words = weights["token_embedding.weight"]
    config = CLIPConfig(
        projection_dim=weights["visual.proj"].shape[1],
        vision_config={
            "hidden_size": len(patches), "num_attention_heads": vision_heads, "hidden_act": "gelu", "patch_size": patch,
            "image_size": _side(weights["visual.positional_embedding"]) * patch,
            **_depth(found, "vision_model.encoder.layers.", "mlp.fc1.weight"),
        },
        text_config={
            "hidden_size": words.shape[1], "vocab_size": len(words), "num_attention_heads": text_heads,
            "hidden_act": "gelu", "max_position_embeddings": len(weights["positional_embedding"]),
            "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,  # pooled at the end token, the last word
            **_depth(found, "text_model.encoder.layers.", "mlp.fc1.weight"),
        },
    )  # fmt: skip
    return _filled(CLIPModel, config, found, "an open_clip CLIP")


def imagereward_from_blip(
    weights: Weights, vision_heads: int = BLIP_VISION_HEADS, text_heads: int = BLIP_TEXT_HEADS
) -> tuple[Any, Any, nn.Sequential]:
    """ImageReward's checkpoint as `BlipVisionModel`, `BlipTextModel` (with cross-attention) and the linear head.

    The text keys are transformers' own after `blip.text_encoder.`; the vision tower is timm's. Layer norms of the vision
    tower have eps 1e-6. The pretraining projections (`vision_proj`, `text_proj`) are left out: the reward does not use
    them. Raises ValueError naming tensors that are missing or unknown.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seen: Weights = {}
    for name, value in _under(weights, "blip.visual_encoder.").items():
        block = name.removeprefix("blocks.")
        if block != name:
            number, _, rest = block.partition(".")
            module, _, kind = rest.rpartition(".")
            seen[f"encoder.layers.{number}.{_BLIP_BLOCK.get(module, module)}.{kind}"] = value
        else:
            seen[_BLIP_VISION.get(name, name)] = value
    read = _under(weights, "blip.text_encoder.")
    words, places = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    _need(seen, ["embeddings.patch_embedding.weight", "embeddings.position_embedding"])
    _need(read, [words, places])
    width, patch = len(seen["embeddings.patch_embedding.weight"]), seen["embeddings.patch_embedding.weight"].shape[-1]
    vision = BlipVisionConfig(
        hidden_size=width, num_attention_heads=vision_heads, patch_size=patch, layer_norm_eps=1e-6,
        image_size=_side(seen["embeddings.position_embedding"][0]) * patch,
        **_depth(seen, "encoder.layers.", "mlp.fc1.weight"),
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=len(read[words]), hidden_size=read[words].shape[1], encoder_hidden_size=width,
        num_attention_heads=text_heads, max_position_embeddings=len(read[places]), is_decoder=True,
        **_depth(read, "encoder.layer.", "intermediate.dense.weight"),
    )  # fmt: skip
    return (
        _filled(BlipVisionModel, vision, seen, "ImageReward's vision tower"),
        _filled(BlipTextModel, text, read, "ImageReward's text tower", add_pooling_layer=False),
        linear_head(_under(weights, "mlp.")),
    )


def linear_head(weights: Weights) -> nn.Sequential:
    """`layers.N.weight`, `layers.N.bias` for rising N as linear layers one after another, without activations.

    The layout of improved-aesthetic-predictor (and ImageReward's copy): the numbers left out are dropout, and its ReLUs
    are commented out. The last layer must give one number. Raises ValueError for other layouts.
    """
    names = sorted((name for name in weights if name.endswith(".weight")), key=lambda name: int(name.split(".")[1]))
    layers: list[nn.Linear] = []
    for name in names:
        bias = weights.get(name.removesuffix("weight") + "bias")
        rows, columns = weights[name].shape
        if bias is None or (layers and layers[-1].out_features != columns):
            raise RewardError(
                f"{name} of the head has shape {(rows, columns)}, which does not follow the layer before it."
            )
        layer = nn.utils.skip_init(nn.Linear, columns, rows)
        layer.load_state_dict({"weight": weights[name], "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1 or len(weights) != 2 * len(layers):
        raise RewardError(
            f"the head holds {', '.join(sorted(weights)) or 'nothing'}; expected layers.N.weight and layers.N.bias, "
            "the last of them with one output."
        )
    return nn.Sequential(*layers)


def _filled(kind: Any, config: Any, weights: Weights, what: str, **options: Any) -> Any:
    """The model of a configuration with these weights, all of them and no others; the generator is not touched."""
    model, found = kind.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True,
        dtype=torch.float32, **options,
    )  # fmt: skip
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[wrong]:
            some = ", ".join(sorted(map(str, found[wrong]))[:3])
            raise RewardError(
                f"the weights are not those of {what}: {wrong.replace('_', ' ')} {some} (in transformers' names)."
            )
    return model


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _need(weights: Weights, names: list[str]) -> None:
    for name in names:
        if name not in weights:
            some = ", ".join(sorted(weights)[:3]) or "nothing"
            raise RewardError(f"the weights hold no {name} but {some}; they are of another layout.")


def _side(positions: Tensor) -> int:
    """Patches along a side, from the position embeddings [1 + side^2, width]."""
    return math.isqrt(len(positions) - 1)


def _depth(weights: Weights, prefix: str, wide: str) -> dict[str, Any]:
    """Number of layers, and the width inside the first one's MLP."""
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)}
    _need(weights, [f"{prefix}0.{wide}"])
    return {"num_hidden_layers": len(numbers), "intermediate_size": len(weights[f"{prefix}0.{wide}"])}
