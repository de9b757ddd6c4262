"""A reward from an ONNX file, by the gradient-keeping `OnnxModule`: `load("onnx:scorer.onnx", ...)`.

Knows how samples become the graph's input and its output a reward. A picture is resized without regard to its aspect
(bicubic, antialiased, in tensors), brought into the range and the order of channels that the graph wants, and put into its
layout; samples that are no pictures go in as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import ClassOf, known, reward_dtype
from .image import check_images, class_by_name, class_index, read_class_names
from .onnx_graph import OnnxModule, Port

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "log": lambda x: x.clamp_min(torch.finfo(x.dtype).tiny).log(),
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
}
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class OnnxReward:
    """R = weight * transform(output)[index] of an ONNX graph, with its gradient in the samples.

    Args:
        file: path of the ONNX file.
        input: name of the graph's input that gets the samples; needed if it has several, which are then all an error.
        output: name of the output; needed if the graph has several.
        index: which of the output's numbers a sample; a class's name from `classes`, or "prompt" for the class that the
            prompt names. Not needed where there is one number. For [B, m, n] a list of two.
        classes: a file of the output's class names, one a line; synonyms are separated by commas.
        transform: none, log, sigmoid, log_sigmoid, softmax, log_softmax; the last two over the output's last axis.
        weight: a factor; -1 turns a penalty into a reward.
        size: [height, width] or one number for both, to which pictures are resized; by default what the graph says, and
            the samples' own where it leaves that free.
        layout: nchw or nhwc; by default what the graph's lengths say.
        channels: rgb or bgr. A graph of one channel gets the luma, grey samples are repeated for one of three.
        value_range: what 0 and 1 become, such as [-1, 1] or [0, 255].
        mean: numbers, one a channel, applied after it: (x - mean) / std.
        std: what the difference to the mean is divided by, likewise.
        batch_size: samples at a time; one where the file says so.

    Calling: samples [B, ...] ([B, 1 or 3, H, W] in [0, 1] for a graph that takes four axes), condition of B -> [B].
    Raises RewardError for a file or an option that cannot be used, with the graph's inputs and outputs.
    """

    def __init__(
        self,
        file: str,
        input: str = "",
        output: str = "",
        index: int | str | Sequence[int] | None = None,
        classes: str = "",
        transform: str = "none",
        weight: float = 1.0,
        size: int | Sequence[int] | None = None,
        layout: str = "",
        channels: str = "rgb",
        value_range: Sequence[float] = (0.0, 1.0),
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        batch_size: int = 16,
    ) -> None:
        self.name = f"onnx:{Path(file).name}"
        self.network = OnnxModule(file).eval().requires_grad_(False)
        self.input, self.output = self._port("input", input), self._port("output", output)
        if transform not in TRANSFORMS:
            raise self._refusal(f"transform is {transform!r}. {known('Known', transform, TRANSFORMS)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or not weight:
            raise self._refusal(f"weight is {weight!r}; give a finite number other than 0.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise self._refusal(f"batch_size is {batch_size!r}; give a whole number of at least 1.")
        self.transform, self.weight = transform, float(weight)
        self._set_index(index, classes)
        shape = self.input.shape or ()
        fixed = shape[0] if shape and isinstance(shape[0], int) else None
        if fixed not in (None, 1):
            raise self._refusal(f"takes batches of {fixed} only. Export it with a free batch, or with 1.")
        self.batch_size = fixed or batch_size
        self._set_pictures(size, layout, channels, value_range, mean, std)
        self.differentiable = self._try()

    # --- options ---

    def _refusal(self, what: str) -> RewardError:
        return RewardError(f"reward {self.name}: {what} The file's {self.network.ports()}")

    def _port(self, kind: str, name: str) -> Port:
        ports = self.network.inputs if kind == "input" else self.network.outputs
        if kind == "input" and len(ports) != 1:
            raise self._refusal(f"the graph has {len(ports)} inputs, and a reward gives one. Export it with one.")
        if not name and len(ports) > 1:
            raise self._refusal(f"several outputs; give one as the option {kind}.")
        found = next((port for port in ports if port.name == name or not name), None)
        if found is None:
            raise self._refusal(f"{kind} is {name!r}. {known('Known', name, [port.name for port in ports])}")
        if found.dtype not in (torch.float32, torch.float64):
            raise self._refusal(
                f"{kind} {found.name!r} is of whole numbers, which have no gradient. Export it in floats."
            )
        return found

    def _set_index(self, index: int | str | Sequence[int] | None, classes: str) -> None:
        self.class_of: ClassOf | None = None
        self.index: tuple[int, ...] | None
        names = read_class_names(classes) if classes else []
        if isinstance(index, str):
            if not names:
                raise self._refusal(
                    f"index is {index!r}, a name; give the file of the class names as the option classes."
                )
            if index == "prompt":
                self.class_of, self.index = class_by_name(names), None
                return
            index = class_index(names, index)
        elif names:
            raise self._refusal("classes is used where index is a class's name or 'prompt'.")
        numbers = [] if index is None else [index] if isinstance(index, int) else list(index)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise self._refusal(f"index is {index!r}; give whole numbers from 0 on, or a class's name.")
        self.index = tuple(int(n) for n in numbers) or None

    def _set_pictures(
        self,
        size: int | Sequence[int] | None,
        layout: str,
        channels: str,
        value_range: Sequence[float],
        mean: float | Sequence[float],
        std: float | Sequence[float],
    ) -> None:
        shape = self.input.shape
        self.pictures = shape is None or len(shape) == 4
        if not self.pictures:
            given = (size, layout, channels, list(value_range), mean, std)
            if given != (None, "", "rgb", [0.0, 1.0], 0.0, 1.0):
                raise self._refusal(
                    "its input is no picture; size, layout, channels, value_range, mean, std are for those."
                )
            return
        at = {"nchw": (1, 2, 3), "nhwc": (3, 1, 2)}
        if not layout and shape is not None:
            fits = [name for name, (c, _, _) in at.items() if shape[c] in (1, 3)]
            layout = fits[0] if len(fits) == 1 else ""
        if layout not in at:
            said = f"layout is {layout!r}" if layout else "its input does not say where the channels are"
            raise self._refusal(f"{said}; give nchw or nhwc as the option layout.")
        self.layout = layout
        c, h, w = ("?" if shape is None else shape[axis] for axis in at[layout])
        self.channels = c if isinstance(c, int) else None
        if self.channels not in (None, 1, 3):
            raise self._refusal(f"its input has {c} channels as {layout}; a picture gives 1 or 3. Is layout right?")
        if channels not in ("rgb", "bgr"):
            raise self._refusal(f"channels is {channels!r}; give rgb or bgr.")
        self.bgr = channels == "bgr"
        own = (h, w) if isinstance(h, int) and isinstance(w, int) else None
        self.size = own if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if self.size is not None and (len(self.size) != 2 or any(not isinstance(n, int) or n < 1 for n in self.size)):
            raise self._refusal(f"size is {size!r}; give one whole number, or [height, width].")
        for wanted, fixed in zip(self.size or (), (h, w), strict=False):
            if isinstance(fixed, int) and wanted != fixed:
                raise self._refusal(f"size is {size!r}, but the graph wants {h} x {w}. Leave the option out.")
        low_high = [float(n) for n in value_range]
        self.mean, self.std = (torch.tensor(n, dtype=torch.float64).reshape(-1, 1, 1) for n in (mean, std))
        if len(low_high) != 2 or low_high[0] == low_high[1]:
            raise self._refusal(f"value_range is {value_range!r}; give what 0 and 1 become, such as [-1, 1].")
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3) or not bool((self.std > 0).all()):
            raise self._refusal(f"mean is {mean!r}, std {std!r}; give one number or three, std positive.")
        self.low, self.high = low_high

    def _try(self) -> bool:
        """Whether the output follows the input, by one blank sample where its shape is known; what is wrong is said now."""
        shape = self.input.shape or ("?",)
        if self.pictures:
            if self.size is None:
                return True
            x = torch.full((1, self.channels or 3, *self.size), 0.5)
        elif all(isinstance(n, int) for n in shape[1:]):
            x = torch.full((1, *(int(n) for n in shape[1:])), 0.5)
        else:
            return True
        with torch.enable_grad():
            output = self._output(x.requires_grad_(True))
        if self.class_of is None:
            self._chosen(output, Condition([""]))
        return output.requires_grad

    # --- calling ---

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.network.to(samples.device)
        parts = torch.arange(len(samples)).split(self.batch_size)
        scores = [self._chosen(self._output(samples[i[0] : i[-1] + 1]), condition[i]) for i in parts]
        return self.weight * torch.cat(scores).to(reward_dtype(samples))

    def prepared(self, samples: Tensor) -> Tensor:
        """What the graph gets: pictures resized, in its range and layout; [b, C, H, W] or [b, H, W, C]."""
        x = samples.to(self.input.dtype)
        if not self.pictures:
            return x
        check_images(samples)
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        if self.channels == 1 and x.shape[1] == 3:
            x = (x * x.new_tensor(GREY).reshape(-1, 1, 1)).sum(1, keepdim=True)
        elif self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        x = self.low + (self.high - self.low) * x
        x = (x - self.mean.to(x)) / self.std.to(x)  # in the order red, green, blue
        x = x.flip(1) if self.bgr else x
        return x if self.layout == "nchw" else x.permute(0, 2, 3, 1)

    def _output(self, samples: Tensor) -> Tensor:
        x = self.prepared(samples)
        shape = self.input.shape
        if shape is not None and (
            len(shape) != x.ndim
            or any(isinstance(n, int) and n != m for n, m in zip(shape[1:], x.shape[1:], strict=True))
        ):
            raise self._refusal(f"samples of shape {tuple(samples.shape)} do not fit.")
        found = self.network({self.input.name: x})[self.output.name]
        if found.ndim == 0 and len(samples) == 1:
            found = found[None]
        if found.ndim == 0 or len(found) != len(samples):
            raise self._refusal(
                f"output {self.output.name!r} has shape {tuple(found.shape)} for {len(samples)} samples. "
                "Give batch_size=1 if the graph was exported for one at a time."
            )
        return found

    def _chosen(self, output: Tensor, condition: Condition) -> Tensor:
        """One number a row of the graph's output [b, ...]."""
        values = TRANSFORMS[self.transform](output)
        if self.class_of is not None:
            classes = self.class_of(condition).to(values.device)
            if values.ndim != 2 or int(classes.max()) >= values.shape[1]:
                raise self._refusal(
                    f"output {self.output.name!r} has shape {tuple(output.shape)}, not one number for each of the classes."
                )
            return values.gather(1, classes[:, None])[:, 0]
        if self.index is None:
            if values[0].numel() != 1:
                raise self._refusal(
                    f"output {self.output.name!r} holds {values[0].numel()} numbers a sample; give one as the option index."
                )
            return values.reshape(len(values))
        wanted: tuple[int, ...] = self.index if values.ndim > 1 or self.index != (0,) else ()
        if len(wanted) != values.ndim - 1 or any(n >= m for n, m in zip(wanted, values.shape[1:], strict=True)):
            raise self._refusal(f"index is {list(self.index)}, but the output has shape {tuple(values.shape)}.")
        for n in wanted:
            values = values[:, n]
        return values
