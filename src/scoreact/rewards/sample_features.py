"""What a learned reward, and a reward's stand-in, see of decoded samples: a frozen, differentiable map to [B, F].

Either networks that nobody trained, or one that is named, or the user's own function. `Features` carries what it was made
of, so that a reward stored beside it is refused where another map would be under it. Does not know heads, prompts or fits.
Source of the untrained ones: Rahimi & Recht 2007, in their convolutional form.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import ScoreModel
from ..support.errors import RewardError, ScoreactError
from ..support.files import add_to_digest, digest_of_file
from ..support.loading import is_file, is_spec, load_named, said_by
from .base import known, reward_dtype
from .denoiser_features import DenoiserFeatures
from .sample_network import SampleNetwork

SIDE = 64  # pixels a side at about which features are taken
AT_ONCE = 256  # samples that are looked at together


@dataclass(frozen=True)
class Features:
    """A frozen map of decoded samples [B, *D] to features [B, F], and what it was made of.

    Args:
        spec: a name in `KNOWN` or `OF_ANSWERS`, or `path/to/file.py:function` with the full path, or `module:function`.
        options: of it, as they were given.
        shape: *D of the samples that it was opened for.
        digest: of its weights and of the user's file: another one is another map.
        function: the map itself.
    """

    spec: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    digest: str
    function: Callable[..., Tensor] = field(repr=False)

    def __call__(self, samples: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """[B, F], in `reward_dtype` and on the samples' device. Raises RewardError for samples of another shape.

        prompts: of the B samples; only a pretrained model's own features depend on them.
        """
        if tuple(samples.shape[1:]) != self.shape:
            raise RewardError(
                f"features {self.spec} were made for samples of shape {self.shape}; these have "
                f"{tuple(samples.shape[1:])}. Use a reward that was made for this model."
            )
        if isinstance(self.function, DenoiserFeatures):
            return self.function(samples, prompts).to(samples.device, reward_dtype(samples))
        seen, network = samples, _network(self.function)
        if network is not None:
            weight = next(network.to(samples.device).parameters(), samples)
            seen = samples.to(weight.dtype)
        return self.function(seen).to(samples.device, reward_dtype(samples))

    @torch.no_grad()
    def in_parts(self, samples: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """[N, F] of many samples, without a graph; prompts: N, or none."""
        starts = range(0, len(samples), AT_ONCE)
        return torch.cat([self(samples[k : k + AT_ONCE], prompts[k : k + AT_ONCE]) for k in starts])

    def take_model(self, model: ScoreModel) -> None:
        """Of features that are a pretrained model's own: this is the model. Raises RewardError where it is another one."""
        if isinstance(self.function, DenoiserFeatures):
            self.function.take_model(model)

    @property
    def label(self) -> str:
        """The spec, with the options that tell candidates of one spec apart."""
        return f"{self.spec} at {', '.join(map(str, self.options['times']))}" if self.spec == DENOISER else self.spec

    def tensors(self) -> dict[str, Tensor]:
        """What a reward's folder has to keep beside the description: the weights of those that were trained on answers."""
        network = _network(self.function)
        return dict(network.state_dict()) if self.spec in OF_ANSWERS and network is not None else {}

    def described(self) -> dict[str, Any]:
        """What `open_described` makes it from again, for a file of JSON."""
        return {"spec": self.spec, "options": dict(self.options), "shape": list(self.shape), "digest": self.digest}


def open_features(spec: str, shape: Sequence[int], options: Mapping[str, Any] | None = None) -> Features:
    """The map of that name, or the user's own, for samples of this shape.

    Args:
        spec: "convolution" (untrained, of anything), "pixels" (means of 4 x 4 fields, of pictures), "values" (the numbers
            themselves), "classifier" (the shipped one of Fashion-MNIST that is no judge), "imagenet" (option path: its
            weights), "denoiser" (of the model that `take_model` gives; option times), or `file.py:function`: samples
            [B, *D] -> [B, F], or without arguments, returning a module or function that is such a map.
        shape: *D of one decoded sample.
        options: keywords of the function, or of `ImageNetClassifier`.

    Raises:
        RewardError: no such name or option, or what is there gives no finite features [B, F] of such samples.
    """
    given, shape = {name: _full(value) for name, value in (options or {}).items()}, tuple(shape)
    if spec in OF_ANSWERS:
        raise RewardError(
            f"features {spec} are trained on answers, which only `scoreact reward fit` does; give others."
        )
    if spec not in KNOWN and not is_spec(spec):
        raise RewardError(f"unknown features {spec!r}. {known('Known', spec, KNOWN)} Or give 'file.py:function'.")
    place, _, name = spec.rpartition(":")
    if is_spec(spec) and is_file(place):
        spec = f"{Path(place).expanduser().resolve()}:{name}"
    try:
        function = KNOWN[spec](shape, **given) if spec in KNOWN else _own(spec, given)
    except TypeError as error:
        raise RewardError(f"features {spec} cannot be made with the options {given}: {error}.") from None
    if (network := _network(function)) is not None:
        network.eval().requires_grad_(False)
    found = Features(spec, given, shape, _digest(spec, given, function), function)
    if not isinstance(function, DenoiserFeatures):  # which has no model yet
        _try(found)
    return found


def trained_features(network: nn.Module, spec: str, shape: Sequence[int]) -> Features:
    """A network of `OF_ANSWERS` that has been trained, frozen."""
    network.eval().requires_grad_(False)
    return Features(spec, {}, tuple(shape), _digest(spec, {}, network), network)


def open_described(
    described: Mapping[str, Any], where: str, named: str | None = None, tensors: Mapping[str, Tensor] | None = None
) -> Features:
    """What `Features.described` told of, made again.

    Args:
        described: spec, options, shape, digest.
        where: the file that says so, for messages.
        named: the user's own `file.py:function`, wherever it is now: code that only a stored text names is never run.
        tensors: of `Features.tensors`.

    Raises:
        RewardError: code that nobody has named, or another map than it was.
    """
    spec = described["spec"]
    if not is_spec(spec) and named is not None:
        raise RewardError(
            f"{where} sees samples by {spec}, which is no code of yours; leave the features {named!r} out."
        )
    if is_spec(spec) and named is None:
        raise RewardError(
            f"{where} sees samples by {spec}, which is code. It is run where you name it: features={spec}, as a "
            "--reward-option of `scoreact train`."
        )
    if spec in OF_ANSWERS:
        network = OF_ANSWERS[spec](described["shape"])
        try:
            network.load_state_dict(dict(tensors or {}))
        except RuntimeError as error:
            raise RewardError(
                f"{where} and its weights are not of one reward: {' '.join(str(error).split())}"
            ) from None
        found = trained_features(network, spec, described["shape"])
    else:
        found = open_features(named or spec, described["shape"], described["options"])
    if found.digest != described["digest"]:
        raise RewardError(
            f"{where} was fitted on other features than {found.spec} gives now: its code or its weights have changed. "
            "Put them back, or make the reward anew."
        )
    return found


def _full(value: Any) -> Any:
    """A file by its full path, so that it is found from another folder."""
    return (
        str(Path(value).expanduser().resolve())
        if isinstance(value, str) and Path(value).expanduser().is_file()
        else value
    )


def _own(spec: str, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A function of samples, or what a function without samples among its parameters makes."""
    found = load_named(spec, "features")
    if not callable(found):
        raise RewardError(f"features {spec} is a {type(found).__name__}, no function. Name one: samples -> [B, F].")
    if isinstance(found, nn.Module):
        return found
    needed = [
        p for p in inspect.signature(found).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        and p.default is p.empty and p.name not in options
    ]  # fmt: skip
    if needed and not inspect.isclass(found):
        return (lambda samples: found(samples, **options)) if options else found
    made = found(**options)
    if not callable(made):
        raise RewardError(f"features {spec} returned a {type(made).__name__}; expected a function samples -> [B, F].")
    return made


def _network(function: object) -> nn.Module | None:
    """The module that a map is, or is a method of."""
    found = getattr(function, "__self__", function)
    return found if isinstance(found, nn.Module) else None


def _digest(spec: str, options: Mapping[str, Any], function: object) -> str:
    """sha256 of its name, the user's file and all weights."""
    found = hashlib.sha256(repr((spec.rpartition(":")[2], sorted(options.items()))).encode())
    if is_spec(spec):
        place = spec.rpartition(":")[0]
        file = place if is_file(place) else getattr(sys.modules.get(place), "__file__", None)
        found.update(digest_of_file(Path(file)).encode() if file else b"")
    if (network := _network(function)) is not None:
        for name, tensor in sorted(network.state_dict().items()):
            add_to_digest(found, name, tensor)
    return found.hexdigest()


def _try(features: Features) -> None:
    """Raises RewardError, in a sentence, for a map that does not take such samples or gives no features of them."""
    samples = torch.rand(3, *features.shape, generator=torch.Generator().manual_seed(0))
    what = f"features {features.spec}"
    try:
        with torch.no_grad():
            found = features.function(samples)
    except ScoreactError as error:
        raise RewardError(f"{what} do not take samples of shape {features.shape}: {error}") from error
    except Exception as error:
        raise RewardError(
            f"{what} do not take samples of shape {features.shape} ({said_by(error)}). Give others, such as convolution."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 3 or not found.is_floating_point():
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RewardError(f"{what} gave {got} for 3 samples; expected floats (3, F). Flatten or pool what it gives.")
    if not bool(found.isfinite().all()):
        raise RewardError(f"{what} gave NaN or infinity for samples between 0 and 1; mend that.")


# --- the maps ----------------------------------------------------------------------------------------------------------


class RandomConvolution(nn.Module):
    """Pictures [B, C, H, W] -> mean and root mean square of 64 random channels, mean slopes and level, [B, 131].

    Of videos [B, C, T, H, W] the mean and the spread over the frames, [B, 262].

    Smooth and averaged over positions: a surrogate is followed by its gradient, and with maxima or ReLU that is many
    times noisier where it explains the reward no better.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 7, stride=2, padding=3), nn.SiLU(), nn.Conv2d(32, 64, 3, padding=1), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            frames = self(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2]))
            return torch.cat([frames.mean(1), (frames.var(1, correction=0) + 1e-6).sqrt()], dim=1)
        x = F.avg_pool2d(x, max(1, min(x.shape[2:]) // SIDE))
        h = self.layers(x).flatten(2)
        slopes = [(x.diff(dim=axis).square() + 1e-6).sqrt().mean((1, 2, 3)) for axis in (3, 2)]
        sizes = (h.square().mean(2) + 1e-4).sqrt()
        return torch.cat([h.mean(2), sizes, torch.stack([*slopes, x.mean((1, 2, 3))], dim=1)], dim=1)


class RandomLayer(nn.Module):
    """Anything else [B, *D] -> its numbers and 128 smooth random functions of them."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 128), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([x, self.layers(x)], dim=1)


class Pixels(nn.Module):
    """Pictures [B, C, H, W] -> the means of 4 x 4 fields and their squares, [B, 32 C]. What a surrogate sees at the least."""

    def forward(self, x: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.cat([small, small.square()], dim=1)


def random_features(samples: Tensor, seed: int = 0) -> nn.Module:
    """An untrained network on decoded samples like these: samples [B, *D] -> [B, F]. The same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        picture = samples.ndim in (4, 5)
        network = RandomConvolution(samples.shape[1]) if picture else RandomLayer(samples[0].numel())
    return network.to(samples.device).requires_grad_(False)


def _convolution(shape: tuple[int, ...]) -> nn.Module:
    return random_features(torch.zeros(1, *shape))


def _pixels(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) != 3:
        raise RewardError(f"features pixels are of pictures; a sample has shape {shape}. Use convolution or values.")
    return Pixels()


def _values(shape: tuple[int, ...]) -> nn.Module:
    return nn.Flatten()


def _classifier(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Its module stands below this one and is asked for by name, as a user's own would be."""
    return load_named("scoreact.recipes.fashion_mnist.classifiers:load_classifier", "features")("classifier").features


def _imagenet(shape: tuple[int, ...], path: str = "", size: int = 224) -> Callable[[Tensor], Tensor]:
    from .imagenet import ImageNetClassifier

    return ImageNetClassifier(path, size).features


def _denoiser(shape: tuple[int, ...], **options: Any) -> DenoiserFeatures:
    return DenoiserFeatures(**options)


DENOISER = "denoiser"
KNOWN: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "classifier": _classifier,
    "convolution": _convolution,
    DENOISER: _denoiser,
    "imagenet": _imagenet,
    "pixels": _pixels,
    "values": _values,
}
OF_ANSWERS: dict[str, Callable[[Sequence[int]], nn.Module]] = {"network": SampleNetwork}
