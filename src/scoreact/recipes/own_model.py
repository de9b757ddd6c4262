"""A model that was learned from the user's own data, as a folder: model.json, model.safetensors; and as a recipe of its own.

Knows which network suits which data, and how values become states and back. `runs/pretraining.py` makes the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import prediction
from ..dynamics.schedule import RectifiedFlow
from ..models.dilated import DilatedNet
from ..models.network import NetworkModel
from ..models.residual_mlp import ResidualMLP
from ..models.unet import UNet
from ..models.value_networks import Encoder, VectorValue
from ..sampling.spread import PATHS
from ..support.devices import bfloat16_pays
from ..support.errors import RunError
from ..support.files import DIGEST, read_stored, write_json, write_tensors
from ..support.own_data import OwnData
from ..training.config import Config, updated
from .base import Problem, Recipe

ABOUT, WEIGHTS = "model.json", "model.safetensors"
FORMAT = 1  # of model.json
NETWORKS: dict[str, Callable[..., nn.Module]] = {"UNet": UNet, "ResidualMLP": ResidualMLP, "DilatedNet": DilatedNet}
WIDTH = {"pictures": 32, "vectors": 128, "series": 64}  # of the network; of colour pictures half as much again
LARGEST_TABLE = 64  # classes, beyond which a picture's value network tells them apart by their words

SETTINGS = Config(kl_weight=0.3, batch_size=256, iterations=30)
OTHER_RULES = Config(
    kl_weight=0.1, batch_size=128, iterations=40, reference_batches=16, steps=10, learning_rate=2e-4, heldout_samples=256,
    evaluate_every=20,
)  # fmt: skip
# The reward may be a black box: a surrogate of it has a gradient, and the reference's paths teach the optimum first.
OF_PICTURES = updated(OTHER_RULES, {
    "algorithm": "adjoint_matching", "reuse_reference": 16, "reward_gradient": "surrogate", "surrogate_target": "reward",
    "minibatch_size": 256, "decay_from": 0.4, "average": 0.85, "kl_states": 0,
})  # fmt: skip


class PictureModel(NetworkModel):
    """A network model of pictures whose range is known: what lies beyond it is the model's error, and no wrong declaration."""

    def notes(self) -> list[str]:
        return []


class ScaledModel(NetworkModel):
    """A network model of standardised vectors or series, whose samples have the data's own unit.

    Args:
        mean, spread: of the data, of one state's shape or one that broadcasts to it.
        suited_path: solver, grid and steps that draw the data's spread; see `HasPath`.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self,
        *words: Any,
        mean: Tensor,
        spread: Tensor,
        suited_path: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(*words, **options)
        self.suited_path = dict(suited_path)
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def decode(self, x: Tensor) -> Tensor:
        """States [B, *D] in the data's unit."""
        return x * self.spread + self.mean

    def encode(self, samples: Tensor) -> Tensor:
        """Samples in the data's unit as states [B, *D]."""
        return (samples - self.mean) / self.spread


def about_model(data: OwnData, width: int | None = None) -> dict[str, Any]:
    """What model.json says of a model of these data before it is trained: data, network, scaling.

    width: of the network, a multiple of 8; None: one that suits the data.
    """
    shape = list(data.train.values.shape[1:])
    classes = len(data.classes)
    wide = width or WIDTH[data.kind] * (3 if data.kind == "pictures" and shape[0] == 3 else 2) // 2
    scaling: dict[str, Any] = {"low": -1.0, "high": 1.0}
    if data.kind == "pictures":
        levels = max(1, min(5, round(math.log2(min(shape[1:]) / 8)) + 1))  # down to 4 to 6 places of a folded picture
        network = {"class": "UNet", "channels": shape[0], "classes": classes}
        network["widths"] = [wide * min(level + 1, 4) for level in range(levels)]
    elif data.kind == "vectors":
        network = {"class": "ResidualMLP", "dim": shape[0], "classes": classes, "width": wide}
    else:
        network = {"class": "DilatedNet", "channels": shape[0], "length": shape[1], "classes": classes, "width": wide}
    if data.kind != "pictures":
        values = data.train.values.double()
        over = [axis for axis in range(values.ndim) if axis != 1]
        mean, spread = values.mean(over), values.std(over)
        scaling = {"mean": mean.tolist(), "spread": spread.tolist()}
    return {
        "format": FORMAT, "made_by": "scoreact pretrain", "kind": data.kind, "shape": shape, "classes": list(data.classes),
        "columns": list(data.columns), "values": data.values, "network": network, "schedule": "RectifiedFlow",
        "prediction": "velocity", "scaling": scaling,
    }  # fmt: skip


def make_network(about: Mapping[str, Any]) -> nn.Module:
    """The network that model.json describes, untrained."""
    options = {name: value for name, value in about["network"].items() if name != "class"}
    if "widths" in options:
        options["widths"] = tuple(options["widths"])
    return NETWORKS[about["network"]["class"]](**options)


def make_model(about: Mapping[str, Any], network: nn.Module, guidance_scale: float = 1.0) -> NetworkModel:
    """The network as a model: samples are pictures in [0, 1], or vectors and series in the data's unit."""
    words = (network, RectifiedFlow(), prediction.velocity, about["shape"], about["classes"] or None)
    scaling = about["scaling"]
    if "low" in scaling:
        low, high, fast = scaling["low"], scaling["high"], bfloat16_pays()
        return PictureModel(*words, guidance_scale=guidance_scale, low=low, high=high, bfloat16=fast)
    mean, spread = (_column(scaling[name], about) for name in ("mean", "spread"))
    return ScaledModel(*words, mean=mean, spread=spread, suited_path=path_of(about), guidance_scale=guidance_scale)


def _column(numbers: list[float], about: Mapping[str, Any]) -> Tensor:
    """One number a coordinate or a channel, so that it broadcasts over a batch."""
    return torch.tensor(numbers).reshape(-1, *[1] * (len(about["shape"]) - 1))


def path_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that draw the spread of vectors or series, as measured; the surest where nothing was measured."""
    path = about.get("path", PATHS[-1])
    found = {name: path[name] for name in PATHS[-1]}
    if path["solver"] != "ddim":
        found["gradient_at"] = "state"  # of ctrl: the last step has noise and ends where there is no score
    return found


def to_states(about: Mapping[str, Any], flip: bool = False) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What makes the model's states of rows of the data. flip: mirror every other picture, at random."""
    if about["kind"] == "pictures":

        def scaled(rows: Tensor, generator: torch.Generator) -> Tensor:
            x = rows.float().div(127.5).sub(1) if rows.dtype == torch.uint8 else 2 * rows - 1
            if flip:
                mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
            return x

        return scaled
    mean, spread = (_column(about["scaling"][name], about) for name in ("mean", "spread"))
    return lambda rows, generator: (rows - mean.to(rows)) / spread.to(rows)


# --- the folder --------------------------------------------------------------------------------------------------------


def is_own_model(path: Path) -> bool:
    return (path / ABOUT).is_file()


def write_model(folder: Path, about: Mapping[str, Any], network: nn.Module) -> None:
    """model.safetensors, then model.json, which names its digest."""
    digest = write_tensors(folder / WEIGHTS, dict(network.state_dict()))
    write_json(folder / ABOUT, {**about, DIGEST: digest})


def read_about(folder: Path) -> dict[str, Any]:
    """model.json of a folder. RunError where it is damaged."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        NETWORKS[about["network"]["class"]], about["scaling"], about["kind"], about["shape"], about["classes"]
        return dict(about)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{path} is no description of a model of format {FORMAT} ({type(error).__name__}: {error}); restore it."
        ) from None


def read_model(folder: Path, guidance_scale: float = 1.0) -> NetworkModel:
    """The model in a folder. RunError where its files are damaged or do not belong together."""
    about = read_about(folder)
    tensors, header = read_stored(folder / WEIGHTS)
    if header.get(DIGEST) != about.get(DIGEST):
        raise RunError(f"{folder / WEIGHTS} is not the file that {ABOUT} beside it names; restore both of one copy.")
    network = make_network(about)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{folder / WEIGHTS} does not fit {ABOUT} beside it: {' '.join(str(error).split())}") from None
    return make_model(about, network, guidance_scale)


def own_recipe(folder: Path) -> Recipe:
    """The model in a folder as a recipe, without a reward."""
    folder = folder.resolve()
    about = read_about(folder)
    kind, shape, classes = about["kind"], about["shape"], about["classes"]
    what = f"{kind} of {' x '.join(map(str, shape))}{f', {len(classes)} classes' if classes else ''}"

    def value_network() -> nn.Module:
        if kind == "pictures":
            tells_words = len(classes) > LARGEST_TABLE or not classes
            network: nn.Module = Encoder(shape[0], classes=len(classes), words=LARGEST_TABLE if tells_words else 0)
        else:
            network = VectorValue(math.prod(shape))
        network.inputs = "x_data_hat"  # type: ignore[assignment]
        return network

    def build(guidance_scale: float = 1.0) -> Problem:
        model = read_model(folder, guidance_scale)
        return Problem(model, value_network=value_network, labels={"problem": f"{folder.name}, {what}"})

    options = {"guidance_scale": 1.0} if classes else {}
    settings = OF_PICTURES if kind == "pictures" else updated(SETTINGS, path_of(about))
    return Recipe(
        str(folder), f"{what}, learned from {about.get('data', 'data')}", build, settings, options, needs_reward=True
    )
