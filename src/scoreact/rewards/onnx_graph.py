"""An ONNX file as a torch module: the numbers of a runtime, with a gradient.

Knows how a graph is read and run; what each operator computes is in `onnx_operators`. A file is refused when it is read if
it holds an operator, an attribute or a version that is not known, by name: nothing is skipped. Nothing in it is executed but
these operators. Whole-number values stay on the CPU, where shapes are computed; the others live on the module's device.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import RewardError
from .onnx_operators import DTYPES, Floats, Ints, dtype_of_code, operator

OPSETS = range(7, 29)  # versions of the standard operators; 7 brought today's broadcasting


@dataclass(frozen=True)
class Port:
    """An input or an output of a graph. shape: a number, or the name (or "?") of a length that is free; None if unknown."""

    name: str
    dtype: torch.dtype | None  # None: a type that is not computed here
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        lengths = "?" if self.shape is None else ", ".join(map(str, self.shape))
        return f"{self.name} [{lengths}] {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Step:
    """A node: where its values come from, where they go, and which values nobody needs afterwards."""

    call: Callable[..., Any]
    what: str  # for messages
    inputs: Sequence[str]  # "" for one that is left out
    numbers: Mapping[int, type]  # inputs that the function wants as numbers: int or float
    attributes: Mapping[str, Any]
    outputs: Sequence[str]
    done: Sequence[str] = ()


class OnnxModule(nn.Module):
    """The graph of an ONNX file.

    Args:
        file: a path, the bytes of a file, or an `onnx.ModelProto`. Tensors that a file keeps beside itself are read too.

    Calling: {input name: tensor} -> {output name: tensor}. Weights in half precision are widened to float32. Constants that
    are floats are buffers: `.to(device)` moves them.
    Raises RewardError for a file that is no ONNX model or that uses what is not known here, naming it.
    """

    def __init__(self, file: str | Path | bytes | Any) -> None:
        super().__init__()
        self.where = str(file) if isinstance(file, str | Path) else "the ONNX graph"
        model = _read(file, self.where)
        graph = model.graph
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        if self.opset not in OPSETS:
            raise RewardError(
                f"{self.where} is of opset {self.opset}; known are {OPSETS.start} to {OPSETS.stop - 1}. "
                "Convert it with onnx.version_converter, or export it again."
            )
        self._refuse_unknown(graph)
        self._constants: dict[str, Tensor] = {}  # whole numbers and truth values; floats are buffers
        self._buffer_of: dict[str, str] = {}
        for entry in graph.initializer:
            self._keep(entry.name, _tensor(entry))
        self.inputs = [_port(value) for value in graph.input if not self._is_constant(value.name)]
        self.outputs = [_port(value) for value in graph.output]
        self._steps = self._folded([_step(node, self.opset) for node in graph.node])

    def ports(self) -> str:
        """The inputs and outputs in words."""
        return f"inputs: {'; '.join(map(str, self.inputs))}. Outputs: {'; '.join(map(str, self.outputs))}."

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(inputs) != {port.name for port in self.inputs}:
            raise RewardError(f"{self.where} got {', '.join(inputs) or 'nothing'}. Its {self.ports()}")
        values = {**self._constants, **{name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}}
        values.update(inputs)
        for step in self._steps:
            self._run(step, values)
        return {port.name: values[port.name] for port in self.outputs}

    def _refuse_unknown(self, graph: Any) -> None:
        unknown = set()
        for node in graph.node:
            name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            function = None if "." in name else operator(name, self.opset)
            if function is None:
                unknown.add(name)
                continue
            known = inspect.signature(function).parameters
            unknown |= {f"{name} with the attribute {a.name}" for a in node.attribute if a.name not in known}
            if sum(map(bool, node.output)) > 1 and "outputs" not in known and name != "Split":
                unknown.add(f"{name} with {len(node.output)} outputs")
            if len(node.input) > len(known) and not any(p.kind is p.VAR_POSITIONAL for p in known.values()):
                unknown.add(f"{name} with {len(node.input)} inputs")
        if unknown:
            raise RewardError(
                f"{self.where} uses what is not supported: {', '.join(sorted(unknown))}. Export it without, "
                "or write the reward as a function of yours that calls onnxruntime (without a gradient)."
            )

    def _is_constant(self, name: str) -> bool:
        return name in self._constants or name in self._buffer_of

    def _keep(self, name: str, value: Tensor) -> None:
        if value.is_floating_point():
            self._buffer_of[name] = f"constant_{len(self._buffer_of)}"
            self.register_buffer(self._buffer_of[name], value)
        else:
            self._constants[name] = value

    def _folded(self, steps: Sequence[Step]) -> list[Step]:
        """Those that depend on the inputs, what they free after each; the others are computed once, here."""
        left = []
        with torch.no_grad():
            for step in steps:
                if all(self._is_constant(name) for name in step.inputs if name):
                    found = {**self._constants, **{name: getattr(self, at) for name, at in self._buffer_of.items()}}
                    self._run(step, found)
                    for name in filter(None, step.outputs):
                        self._keep(name, found[name].contiguous())
                else:
                    left.append(step)
        wanted, freed = {port.name for port in self.outputs}, []
        for step in reversed(left):
            done = [name for name in dict.fromkeys(step.inputs) if name and name not in wanted]
            wanted.update(done)
            freed.append(Step(**{**vars(step), "done": done}))
        return freed[::-1]

    def _run(self, step: Step, values: dict[str, Tensor]) -> None:
        """Compute a node's outputs into `values`, in place."""
        given = [values[name] if name else None for name in step.inputs]
        device = next((x.device for x in given if x is not None and x.device.type != "cpu"), None)
        arguments: list[Any] = []
        for i, x in enumerate(given):
            if x is not None and i in step.numbers:
                arguments.append([step.numbers[i](n) for n in x.flatten().tolist()])
            else:
                arguments.append(x if x is None or device is None else x.to(device))
        try:
            found = step.call(*arguments, **step.attributes)
        except RewardError as error:
            raise RewardError(f"{self.where}, {step.what}: {error}") from None
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            shapes = ", ".join("none" if x is None else str(list(x.shape)) for x in given)
            raise RewardError(
                f"{self.where}, {step.what} cannot be computed for inputs of shape {shapes} "
                f"({shorten(str(error), 200)}). Is the shape that it was given the one it was exported for?"
            ) from error
        results = found if isinstance(found, tuple | list) else (found,)
        for name in step.done:
            values.pop(name, None)
        values.update(zip(step.outputs, results, strict=False))


def _read(file: Any, where: str) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"a reward from an ONNX file needs onnx ({error}); pip install 'scoreact[onnx]'.") from error
    from google.protobuf.message import DecodeError
    from onnx.inliner import inline_local_functions

    if isinstance(file, str | Path) and not Path(file).expanduser().is_file():
        raise RewardError(
            f"ONNX file {where!r} does not exist (looked in {Path.cwd()}). Give the path of an .onnx file."
        )
    try:
        if isinstance(file, bytes):
            model = onnx.load_from_string(file)
        else:
            model = onnx.load(str(Path(file).expanduser())) if isinstance(file, str | Path) else file
        if not model.graph.node or not model.graph.output:
            raise RewardError(f"{where} holds no ONNX graph; give a file that torch.onnx.export or the like wrote.")
        return inline_local_functions(model) if model.functions else model
    except DecodeError as error:
        raise RewardError(f"{where} is no ONNX file ({error}). Give a file that torch.onnx.export wrote.") from error
    except (OSError, onnx.checker.ValidationError) as error:  # the tensors that it keeps beside itself
        raise RewardError(f"{where} cannot be read ({shorten(str(error), 200)}).") from error


def _tensor(entry: Any) -> Tensor:
    from onnx import numpy_helper

    dtype = dtype_of_code(entry.data_type)
    array = numpy_helper.to_array(entry)
    return torch.from_numpy(array.astype(str(dtype).removeprefix("torch.")))  # a copy, half precision widened


def _port(value: Any) -> Port:
    of = value.type.tensor_type
    lengths = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in of.shape.dim]
    return Port(value.name, DTYPES.get(of.elem_type), tuple(lengths) if of.HasField("shape") else None)


def _step(node: Any, opset: int) -> Step:
    from onnx import helper

    function = operator(node.op_type, opset)
    assert function is not None  # unknown ones were refused
    hints = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters)
    attributes = {}
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        value = value.decode() if isinstance(value, bytes) else value
        value = [v.decode() if isinstance(v, bytes) else v for v in value] if isinstance(value, list) else value
        attributes[entry.name] = _tensor(value) if entry.type == entry.TENSOR else value
    if "outputs" in parameters:
        attributes["outputs"] = len(node.output)
    kinds = {i: _number(hints.get(name)) for i, name in enumerate(parameters[: len(node.input)])}
    numbers = {i: kind for i, kind in kinds.items() if kind is not None}
    what = f"node {node.name or node.output[0]!r} ({node.op_type})"
    return Step(function, what, list(node.input), numbers, attributes, list(node.output))


def _number(hint: Any) -> type | None:
    if hint in (Ints, Ints | None):
        return int
    return float if hint in (Floats, Floats | None) else None
