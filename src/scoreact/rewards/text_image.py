"""The field's rewards for pictures of a prompt: CLIPScore, PickScore, HPSv2.1, ImageReward and LAION's aesthetic score.

Knows formulas, preprocessing and where the published weights lie; the weights' layouts are in `convert`. All are
differentiable with respect to the pictures: preprocessing is done in tensors. Departures from the authors' code: pictures
are resized before they are rounded to 8 bits, not after (HPSv2's own code does the same), and the crop of a picture that is
not square is transformers', which may lie one pixel beside torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import RewardError
from ..types import Condition
from . import published_weights as convert
from .base import reward_dtype
from .image import check_images

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's; open_clip's ViT-H-14 and ImageReward use the same
STD = (0.26862954, 0.26130258, 0.27577711)
IMAGEREWARD_MEAN, IMAGEREWARD_STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py
IMAGEREWARD_TOKENS = 35
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose tokenizer PickScore and HPSv2 use
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def preprocess(images: Tensor, size: int) -> Tensor:
    """Pictures [B, 1 or 3, H, W] in [0, 1] as a CLIP sees them: [B, 3, size, size], float32, differentiable.

    The shorter side becomes `size` (bicubic, antialiased), the middle is cut out, and each channel is (x - MEAN) / STD.
    Grey pictures get three equal channels. Agrees with `CLIPImageProcessor` up to its rounding to 8 bits.
    """
    check_images(images)
    height, width = images.shape[-2:]
    short = min(height, width)
    rows, columns = int(size * height / short), int(size * width / short)
    x = images.float().expand(-1, 3, -1, -1)
    if (rows, columns) != (height, width):
        x = F.interpolate(x, (rows, columns), mode="bicubic", antialias=True)
    top, left = (rows - size) // 2, (columns - size) // 2
    x = x[..., top : top + size, left : left + size]
    return (x - x.new_tensor(MEAN).reshape(3, 1, 1)) / x.new_tensor(STD).reshape(3, 1, 1)


class PerPrompt:
    """Rows made once a prompt, and kept: prompts of B -> [B, ...]. `make`: n new prompts -> [n, ...]."""

    def __init__(self, make: Callable[[list[str]], Tensor]) -> None:
        self.make = make
        self.rows: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]
        if new:
            self.rows.update(zip(new, self.make(new).cpu(), strict=True))
        return torch.stack([self.rows[prompt] for prompt in prompts]).to(device)


class PictureReward:
    """Frozen networks on the samples' device that score pictures and prompts, `batch_size` at a time.

    A kind of reward gives `score`: pixels [b, 3, size, size] as `preprocess` makes them, prompts of b -> [b]. dtype
    (float32, float16, bfloat16) is that of `trunk`; `head` and what follows it are float32.
    Calling: samples [B, 1 or 3, H, W] in [0, 1], condition of B -> [B], float32 (float64 for float64 samples).
    """

    name: str
    differentiable = True

    def __init__(self, trunk: nn.Module, size: int, dtype: str, batch_size: int, head: nn.Module | None = None) -> None:
        self.dtype, self.size, self.batch_size = dtype_of(self.name, dtype, batch_size), size, batch_size
        self.networks = nn.ModuleList([trunk.to(self.dtype), *([] if head is None else [head.float()])])
        self.networks.eval().requires_grad_(False)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.networks.to(samples.device)
        scores = [
            self.score(preprocess(samples[i : i + self.batch_size], self.size).to(self.dtype), prompts)
            for i, prompts in in_parts_of(condition.prompts, self.batch_size)
        ]
        return torch.cat(scores).to(reward_dtype(samples))

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError


def dtype_of(reward: str, dtype: str, batch_size: int) -> torch.dtype:
    """The dtype of that name. Raises ValueError for another, and for a batch_size that is no positive whole number."""
    if dtype not in DTYPES:
        raise RewardError(f"reward {reward}: dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RewardError(f"reward {reward}: batch_size is {batch_size!r}; give a whole number of at least 1.")
    return DTYPES[dtype]


def in_parts_of(prompts: Sequence[str], batch_size: int) -> list[tuple[int, list[str]]]:
    """(first index, prompts) of each part of at most `batch_size`."""
    return [(i, list(prompts[i : i + batch_size])) for i in range(0, len(prompts), batch_size)]


class _Cosine(PictureReward):
    """A CLIPModel and its tokenizer; subclasses turn the cosine of picture and prompt into the reward."""

    def __init__(self, model: Any, tokenizer: Any, dtype: str, batch_size: int) -> None:
        super().__init__(model, model.config.vision_config.image_size, dtype, batch_size)
        self.model, self.tokenizer = model, tokenizer
        self.texts = PerPrompt(self._embed)

    def _embed(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return unit(self.model.get_text_features(**tokens.to(self.model.device)))

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """<picture, prompt> of the two embeddings, each of length 1. -> [b], float32"""
        return (unit(self.model.get_image_features(pixels)) * self.texts(prompts, pixels.device)).sum(-1)


class CLIPScore(_Cosine):
    """R = weight max(cos(picture, prompt), 0): Hessel et al. 2021, arXiv 2104.08718, eq. 1.

    weight: 100 as in torchmetrics; the paper takes 2.5. path: a `CLIPModel` with its tokenizer, a folder or a hub id;
    torchmetrics' default model is ours, the paper's is openai/clip-vit-base-patch32.
    """

    name = "clip"

    def __init__(
        self,
        path: str = CLIP_L,
        weight: float = 100.0,
        dtype: str = "float32",
        batch_size: int = 16,
        tokenizer: str = "",
    ) -> None:
        self.weight = weight
        model = pretrained(self.name, "CLIPModel", path)
        super().__init__(model, tokenizer_of(self.name, tokenizer or path), dtype, batch_size)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.weight * self.cosine(pixels, prompts).clamp_min(0)


class PickScore(_Cosine):
    """R = exp(logit_scale) cos(picture, prompt): Kirstain et al. 2023, arXiv 2305.01569; about 17 to 24.

    Flow-GRPO's code divides it by 26: the same run has 26 times its kl_weight here. path: the authors' `CLIPModel`
    (ViT-H/14), a folder or a hub id; tokenizer: that folder when it holds one, else that of the CLIP it was tuned from.
    """

    name = "pickscore"

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        dtype: str = "float32",
        batch_size: int = 16,
        tokenizer: str = "",
    ) -> None:
        model = pretrained(self.name, "CLIPModel", path)
        super().__init__(model, tokenizer_of(self.name, tokenizer or own_or(path, CLIP_H)), dtype, batch_size)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * self.cosine(pixels, prompts)


class HPSv2(_Cosine):
    """R = cos(picture, prompt) of HPSv2.1: Wu et al. 2023, arXiv 2306.09341; about 0.2 to 0.35.

    path: a folder or hub id with the authors' open_clip file, the file itself, or a folder with a converted `CLIPModel`
    (`convert.clip_from_open_clip(...).save_pretrained(folder)`); file: its name there (HPS_v2_compressed.pt is version 2.0).
    """

    name = "hps"

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        file: str = "HPS_v2.1_compressed.pt",
        dtype: str = "float32",
        batch_size: int = 16,
        tokenizer: str = "",
    ) -> None:
        if (Path(path).expanduser() / "config.json").is_file():
            model = pretrained(self.name, "CLIPModel", path)
        else:
            need_transformers(self.name)
            model = convert.clip_from_open_clip(convert.read_weights(located(self.name, path, file)))
        super().__init__(model, tokenizer_of(self.name, tokenizer or own_or(path, CLIP_H)), dtype, batch_size)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosine(pixels, prompts)


class Aesthetic(PictureReward):
    """R = linear layers on the picture's CLIP ViT-L/14 embedding of length 1: LAION's predictor v2; about 1 to 10.

    After Schuhmann, improved-aesthetic-predictor (`simple_inference.py`; sac+logos+ava1-l14-linearMSE). The prompt is not
    looked at. path: the CLIP, a folder or a hub id; head: a file of `layers.N.weight`, `layers.N.bias`, or a hub id or
    folder that holds `file`.
    """

    name = "aesthetic"

    def __init__(
        self,
        path: str = CLIP_L,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        file: str = "aesthetic-model.pth",
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        layers = convert.linear_head(convert.read_weights(located(self.name, head, file, "head")))
        # not CLIPVisionModelWithProjection, whose projection has the vision configuration's width, often another
        clip = pretrained(self.name, "CLIPModel", path)
        self.vision, self.projection, self.head = clip.vision_model, clip.visual_projection, layers
        if layers[0].in_features != self.projection.out_features:
            raise RewardError(
                f"reward {self.name}: the head takes {layers[0].in_features} numbers, but {path!r} gives "
                f"{self.projection.out_features}; give the CLIP it was trained on as the option path."
            )
        towers = nn.ModuleList([self.vision, self.projection])
        super().__init__(towers, clip.config.vision_config.image_size, dtype, batch_size, layers)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(unit(self.projection(self.vision(pixels).pooler_output))).squeeze(-1)


class ImageReward(PictureReward):
    """R = (m - 0.16717362830052426) / 1.0333394966054072: Xu et al. 2023, arXiv 2304.05977; mean 0, spread 1 on its data.

    m: linear layers on the first token of BLIP's text tower, which reads the prompt (35 tokens) and attends to the picture
    (`ImageReward.py`, `score_gard`). path: a folder or hub id with the authors' file, or the file itself; file: its name
    there; tokenizer: a folder or hub id of bert-base-uncased's vocabulary.
    """

    name = "imagereward"

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        dtype: str = "float32",
        batch_size: int = 16,
        tokenizer: str = "",
    ) -> None:
        need_transformers(self.name)
        found = convert.imagereward_from_blip(convert.read_weights(located(self.name, path, file)))
        self.vision, self.text, self.head = found
        towers = nn.ModuleList([self.vision, self.text])
        super().__init__(towers, self.vision.config.image_size, dtype, batch_size, self.head)
        self.tokenizer = tokenizer_of(self.name, tokenizer or own_or(path, "bert-base-uncased"))
        self.tokens = PerPrompt(self._tokens)

    def _tokens(self, prompts: list[str]) -> Tensor:
        """Ids and mask: [n, 2, 35]."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=IMAGEREWARD_TOKENS, return_tensors="pt"
        )
        return torch.stack([tokens.input_ids, tokens.attention_mask], 1)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, mask = self.tokens(prompts, pixels.device).unbind(1)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return (self.head(read[:, 0].float()).squeeze(-1) - IMAGEREWARD_MEAN) / IMAGEREWARD_STD


def unit(found: Any) -> Tensor:
    """Embeddings [b, d] of length 1, float32. transformers 5 returns an output object where 4 returned the tensor."""
    return F.normalize((found if isinstance(found, Tensor) else found.pooler_output).float(), dim=-1)


# --- weights ---------------------------------------------------------------------------------------------------------


def need_transformers(reward: str) -> Any:
    """The package, or an ImportError that names the extra."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"reward {reward} needs transformers ({error}); pip install 'scoreact[diffusers]'."
        ) from error
    return transformers


def located(reward: str, place: str, file: str, option: str = "path") -> Path:
    """The file `place`, or `file` in the folder or hub repository `place`. Raises ValueError naming the option."""
    here = Path(place).expanduser()
    if here.is_file():
        return here
    if here.is_dir():
        if (here / file).is_file():
            return here / file
        reason = f"the folder holds no {file}"
    else:
        need_transformers(reward)  # brings huggingface_hub
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(place, file))
        except (OSError, ValueError) as error:
            reason = shorten(str(error), 160)
    raise RewardError(
        f"reward {reward} found no weights at {place!r}: {reason.rstrip('.')}. "
        f"Give a folder, a file or a hub id as the option {option}."
    )


def pretrained(reward: str, kind: str, place: str) -> Any:
    """transformers' `kind` (a model, or AutoProcessor) from a folder or a hub id. Raises ValueError naming the option."""
    transformers = need_transformers(reward)
    located(reward, place, "config.json")  # says in one try what is missing
    return _read(getattr(transformers, kind), reward, place, "path")


def tokenizer_of(reward: str, place: str) -> Any:
    """The tokenizer in a folder or at a hub id. Raises ValueError naming the option."""
    return _read(need_transformers(reward).AutoTokenizer, reward, place, "tokenizer")


def own_or(folder: str, otherwise: str) -> str:
    """The folder if it holds a tokenizer, else the other place."""
    own = any((Path(folder).expanduser() / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    return folder if own else otherwise


def _read(kind: Any, reward: str, place: str, option: str) -> Any:
    here = Path(place).expanduser()
    try:
        return kind.from_pretrained(str(here) if here.is_dir() else place)
    except (OSError, ValueError, ImportError) as error:  # some processors need packages of their own
        raise RewardError(
            f"reward {reward}: {kind.__name__} cannot be read from {place!r} ({shorten(str(error), 160)}). "
            f"Give a folder or a hub id as the option {option}."
        ) from error
