"""ONNX operators as torch functions, differentiable wherever torch is; `operator` finds the one of a node.

A function's parameters bear the names of the operator's inputs, in their order, and of the attributes it honours. What older
versions give as an attribute and newer ones as an input is one parameter. A parameter of the type Ints or Floats gets numbers
instead of a tensor. `opset` is the graph's version, `outputs` the number of outputs that the node names. Anything without a
parameter is refused when the graph is read. Not here: random operators, quantised arithmetic, loops, sequences and strings.
Formulas: the ONNX operator specification, opsets 7 to 28. Formats of half precision are computed in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.errors import RewardError

Ints = list[int]
Floats = list[float]
Operator = Callable[..., Any]

DTYPES = {  # TensorProto.DataType
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float32, 11: torch.float64, 16: torch.float32,
}  # fmt: skip


def dtype_of_code(code: int) -> torch.dtype:
    """Of TensorProto.DataType. Raises RewardError for one that is not computed here."""
    if code not in DTYPES:
        raise RewardError(f"tensors of ONNX type {code} are not supported. Known: {', '.join(map(str, DTYPES))}.")
    return DTYPES[code]


def operator(name: str, opset: int) -> Operator | None:
    """The function of an operator of the standard domain at that version of it; None for an unknown one."""
    if name in _BEFORE and opset < _BEFORE[name][0]:
        return _BEFORE[name][1]
    return OPERATORS.get(name)


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise RewardError(f"{what} is not supported.")


# --- one number at a time --------------------------------------------------------------------------------------------


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda X: function(X)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda A, B: function(A, B)


def _div(A: Tensor, B: Tensor) -> Tensor:
    return A / B if A.is_floating_point() else torch.div(A, B, rounding_mode="trunc")


def _mod(A: Tensor, B: Tensor, fmod: int = 0) -> Tensor:
    return torch.fmod(A, B) if fmod else torch.remainder(A, B)


def _pow(X: Tensor, Y: Tensor) -> Tensor:
    return torch.pow(X, Y).to(X.dtype)


def _clip(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return input if min is None and max is None else torch.clamp(input, min, max)


def _celu(X: Tensor, alpha: float = 1.0) -> Tensor:
    return F.celu(X, alpha)


def _elu(X: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(X < 0, alpha * torch.expm1(X.clamp_max(0)), X)


def _gelu(X: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(X, approximate=approximate)


def _hard_sigmoid(X: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * X + beta).clamp(0, 1)


def _leaky_relu(X: Tensor, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(X, alpha)


def _prelu(X: Tensor, slope: Tensor) -> Tensor:
    return torch.where(X < 0, X * slope, X)


def _selu(X: Tensor, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * _elu(X, alpha)


def _shrink(input: Tensor, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(input < -lambd, input + bias, torch.where(input > lambd, input - bias, 0)).to(input.dtype)


def _swish(X: Tensor, alpha: float = 1.0) -> Tensor:
    return X * torch.sigmoid(alpha * X)


def _thresholded_relu(X: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(alpha < X, X, 0)


def _is_inf(X: Tensor, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return X.isinf() & ((X < 0) & bool(detect_negative) | (X > 0) & bool(detect_positive))


def _cast(input: Tensor, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:  # both are for 8-bit floats
    return input.to(dtype_of_code(to))


def _cast_like(input: Tensor, target_type: Tensor, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return input.to(target_type.dtype)


def _dropout(
    data: Tensor, ratio: Any = 0.5, training_mode: Tensor | None = None, seed: int = 0, outputs: int = 1
) -> Any:
    _refuse(training_mode is not None and bool(training_mode), "dropout in training mode")
    return (data, torch.ones_like(data, dtype=torch.bool))[:outputs]


def _sum(*data: Tensor) -> Tensor:
    return functools.reduce(torch.add, data)


def _mean(*data: Tensor) -> Tensor:
    return functools.reduce(torch.add, data) / len(data)


def _max(*data: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, data)


def _min(*data: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, data)


# --- constants and shapes --------------------------------------------------------------------------------------------


def _constant(
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Any = None,
    value_int: int | None = None,
    value_ints: Any = None,
) -> Tensor:
    if value is not None:
        return value
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)
    return torch.tensor(value_floats if value_float is None else value_float, dtype=torch.float32)


def _constant_of_shape(input: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(input) if value is None else torch.full(input, value.item(), dtype=value.dtype)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return start + delta * torch.arange(count, dtype=start.dtype, device=start.device)


def _shape(data: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(data.shape[start:end], dtype=torch.int64)


def _size(data: Tensor) -> Tensor:
    return torch.tensor(data.numel())


def _reshape(data: Tensor, shape: Ints, allowzero: int = 0) -> Tensor:
    return data.reshape([data.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(shape)])


def _flatten(input: Tensor, axis: int = 1) -> Tensor:
    return input.reshape(math.prod(input.shape[:axis]), -1)


def _transpose(data: Tensor, perm: Any = None) -> Tensor:
    return data.permute(perm or tuple(reversed(range(data.ndim))))


def _squeeze(data: Tensor, axes: Ints | None = None) -> Tensor:
    return data.squeeze() if axes is None else data.squeeze(tuple(axes))


def _unsqueeze(data: Tensor, axes: Ints) -> Tensor:
    for axis in sorted(axis % (data.ndim + len(axes)) for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _expand(input: Tensor, shape: Ints) -> Tensor:
    return input.expand(torch.broadcast_shapes(input.shape, shape))


def _tile(input: Tensor, repeats: Ints) -> Tensor:
    return input.tile(repeats)


def _concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, axis)


def _split(
    input: Tensor, split: Ints | None = None, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> Any:
    if split is None:
        return torch.split(input, -(-input.shape[axis] // (num_outputs or outputs)), axis)
    return torch.split(input, split, axis)


def _slice(data: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    axes = list(range(len(starts))) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        n = data.shape[axis]
        start, end = (x + n if x < 0 else x for x in (start, end))
        if step > 0:
            kept = torch.arange(min(max(start, 0), n), max(min(end, n), min(max(start, 0), n)), step)
        else:
            kept = torch.arange(min(start, n - 1), min(max(end, -1), min(start, n - 1)), step)
        data = data.index_select(axis, kept.to(data.device))
    return data


def _pad(
    data: Tensor,
    pads: Ints,
    constant_value: Tensor | None = None,
    axes: Ints | None = None,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    axes = list(range(data.ndim)) if axes is None else axes
    fill = value if constant_value is None else constant_value.item()
    for i, axis in enumerate(axes):
        before, after, n = pads[i], pads[i + len(axes)], data.shape[axis]
        if before == after == 0:
            continue
        place = torch.arange(-before, n + after)
        if mode == "edge" or mode == "constant":
            source = place.clamp(0, n - 1)
        elif mode == "wrap":
            source = place % n
        else:
            _refuse(mode != "reflect", f"padding of mode {mode!r}")
            period = max(2 * (n - 1), 1)
            source = (n - 1) - ((place % period) - (n - 1)).abs()
        inside = ((place >= 0) & (place < n)).to(data.device)
        data = data.index_select(axis, source.to(data.device))
        if mode == "constant":
            data = torch.where(inside.reshape([-1] + [1] * (data.ndim - 1 - axis % data.ndim)), data, fill)
    return data


def _depth_to_space(input: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = input.shape
    n = blocksize
    if mode == "CRD":
        x = input.reshape(b, c // n**2, n, n, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        x = input.reshape(b, n, n, c // n**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // n**2, h * n, w * n)


def _space_to_depth(input: Tensor, blocksize: int) -> Tensor:
    b, c, h, w = input.shape
    n = blocksize
    return input.reshape(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4).reshape(b, c * n**2, h // n, w // n)


# --- choosing --------------------------------------------------------------------------------------------------------


def _from_start(indices: Tensor, n: int) -> Tensor:
    return torch.where(indices < 0, indices + n, indices).long()


def _gather(data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    axis %= data.ndim
    rows = data.index_select(axis, _from_start(indices, data.shape[axis]).reshape(-1))
    return rows.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def _gather_elements(data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return data.gather(axis, _from_start(indices, data.shape[axis]))


def _gather_nd(data: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    batches, depth = math.prod(data.shape[:batch_dims]), indices.shape[-1]
    flat = indices.reshape(batches, -1, depth)
    rows = torch.arange(batches, device=data.device)[:, None]
    found = data.reshape(batches, *data.shape[batch_dims:])[(rows, *flat.unbind(-1))]
    return found.reshape((*indices.shape[:-1], *data.shape[batch_dims + depth :]))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none") -> Tensor:
    indices = _from_start(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    return data.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


def _scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    _refuse(reduction not in ("none", "add"), f"ScatterND with reduction {reduction!r}")
    return data.index_put(tuple(indices.long().unbind(-1)), updates, accumulate=reduction == "add")


def _one_hot(indices: Tensor, depth: Ints, values: Tensor, axis: int = -1) -> Tensor:
    hit = _from_start(indices, depth[0])[..., None] == torch.arange(depth[0], device=indices.device)
    return torch.where(hit.movedim(-1, axis), values[1], values[0])


def _extreme(largest: bool) -> Operator:
    def place(data: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        x = data.flip(axis) if select_last_index else data
        best = x.argmax(axis, bool(keepdims)) if largest else x.argmin(axis, bool(keepdims))
        return data.shape[axis] - 1 - best if select_last_index else best

    return place


def _top_k(X: Tensor, k: Ints, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 2) -> Sequence[Tensor]:
    order = torch.sort(
        X, dim=axis, descending=bool(largest), stable=True
    )  # of equals the first one, which topk does not promise
    return tuple(found.narrow(axis, 0, k[0]) for found in order)[:outputs]


def _top_k_of_attribute(X: Tensor, k: int, axis: int = -1, outputs: int = 2) -> Sequence[Tensor]:
    return _top_k(X, [k], axis, outputs=outputs)


def _trilu(input: Tensor, k: Ints | None = None, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(input, k[0] if k else 0)


def _cum_sum(x: Tensor, axis: Ints, exclusive: int = 0, reverse: int = 0) -> Tensor:
    x = x.flip(axis[0]) if reverse else x
    total = x.cumsum(axis[0], dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis[0]) if reverse else total


# --- sums over axes --------------------------------------------------------------------------------------------------


def _reduction(function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Operator:
    """function: (x, axes) -> x with these axes kept as length 1."""

    def reduce(data: Tensor, axes: Ints | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return function(data[None], (0,))[0]
        over = tuple(axis % data.ndim for axis in axes) if axes else tuple(range(data.ndim))
        if not over:
            return function(data[None], (0,))[0]
        found = function(data, over)
        return found if keepdims else found.squeeze(over)

    return reduce


def _prod(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x


def _softmax(input: Tensor, axis: int = -1) -> Tensor:
    return input.softmax(axis)


def _log_softmax(input: Tensor, axis: int = -1) -> Tensor:
    return input.log_softmax(axis)


def _flat_from(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def over_the_rest(input: Tensor, axis: int = 1) -> Tensor:
        return function(_flatten(input, axis), -1).reshape(input.shape)

    return over_the_rest


# --- linear maps -----------------------------------------------------------------------------------------------------


def _gemm(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = alpha * ((A.T if transA else A) @ (B.T if transB else B))
    return product if C is None else product + beta * C


def _einsum(*Inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *Inputs)


def _padding(
    x: Tensor, kernel: Sequence[int], strides: Any, dilations: Any, pads: Any, auto_pad: str
) -> tuple[list[int], list[int], list[int], list[int]]:
    """(strides, dilations, pads before, pads after) of the axes after the second, written out."""
    rank = len(kernel)
    steps, widths = list(strides or [1] * rank), list(dilations or [1] * rank)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(x.shape[2:], kernel, steps, widths, strict=True)
        ]
        less, more = [n // 2 for n in total], [n - n // 2 for n in total]
        return steps, widths, *((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    given = list(pads or [0] * 2 * rank) if auto_pad == "NOTSET" else [0] * 2 * rank
    return steps, widths, given[:rank], given[rank:]


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    both = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, both, value=value) if any(both) else x


def _conv(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    kernel_shape: Any = None,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Tensor:
    strides, dilations, before, after = _padding(X, W.shape[2:], strides, dilations, pads, auto_pad)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[X.ndim - 3]
    if before == after:
        return convolve(X, W, B, strides, before, dilations, group)
    return convolve(_padded(X, before, after), W, B, strides, 0, dilations, group)


def _conv_transpose(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    kernel_shape: Any = None,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    group: int = 1,
    output_padding: Any = None,
    output_shape: Any = None,
) -> Tensor:
    steps, widths, before, after = _padding(X, W.shape[2:], strides, dilations, pads, "NOTSET")
    more = list(output_padding or [0] * len(steps))
    full = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[X.ndim - 3](
        X, W, None, steps, 0, 0, group, widths
    )
    wanted = output_shape
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [n * s for n, s in zip(X.shape[2:], steps, strict=True)]
    if wanted is not None:
        total = [n + p - w for n, p, w in zip(full.shape[2:], more, list(wanted)[-len(steps) :], strict=True)]
        less, rest = [n // 2 for n in total], [n - n // 2 for n in total]
        before, after = (less, rest) if auto_pad == "SAME_UPPER" else (rest, less)
    full = _padded(full, [-n for n in before], [p - n for p, n in zip(more, after, strict=True)])
    return full if B is None else full + B.reshape(-1, *[1] * len(steps))


def _windows(
    x: Tensor, kernel: Any, strides: Any, dilations: Any, pads: Any, auto_pad: str, ceil_mode: int
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """As `_padding`, and the length that whole windows need behind the padded input (negative: what they leave out)."""
    steps, widths, before, after = _padding(x, kernel, strides, dilations, pads, auto_pad)
    more = []
    for n, k, s, d, b, a in zip(x.shape[2:], kernel, steps, widths, before, after, strict=True):
        reach = (k - 1) * d + 1
        room = n + b + a - reach
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= n + b:  # a window must begin within the input or its left padding
            count -= 1
        more.append((count - 1) * s + reach - (n + b + a))
    return steps, widths, before, after, more


def _max_pool(
    X: Tensor,
    kernel_shape: Any,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,  # of the second output, which is not given
) -> Tensor:
    steps, widths, before, after, more = _windows(X, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    after = [a + m for a, m in zip(after, more, strict=True)]
    low = -math.inf if X.is_floating_point() else torch.iinfo(X.dtype).min
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[X.ndim - 3]
    return pool(_padded(X, before, after, low), kernel_shape, steps, 0, widths)


def _average_pool(
    X: Tensor,
    kernel_shape: Any,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    steps, widths, before, after, more = _windows(X, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    counted = torch.ones_like(X[:1, :1])
    if count_include_pad:
        counted = _padded(counted, before, after, 1.0)
        counted = _padded(counted, [0] * len(more), more)
    else:
        counted = _padded(counted, before, [a + m for a, m in zip(after, more, strict=True)])
    x = _padded(X, before, [a + m for a, m in zip(after, more, strict=True)])
    ones = X.new_ones(1, 1, *kernel_shape)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[X.ndim - 3]
    sums = convolve(x.flatten(0, 1)[:, None], ones, None, steps, 0, widths)  # torch's average pools have no dilation
    return (sums / convolve(counted, ones, None, steps, 0, widths)).reshape(*X.shape[:2], *sums.shape[2:])


def _over_space(function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Operator:
    return lambda X: function(X, tuple(range(2, X.ndim)))


# --- normalisation ---------------------------------------------------------------------------------------------------


def _standardised(x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + epsilon), with the mean and one over that root."""
    mean = x.mean(tuple(axes), keepdim=True)
    scale = (x - mean).square().mean(tuple(axes), keepdim=True).add(epsilon).rsqrt()
    return (x - mean) * scale, mean, scale


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _batch_normalization(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    _refuse(bool(training_mode), "batch normalisation in training mode")
    return F.batch_norm(X, input_mean, input_var, scale, B, False, 0.0, epsilon)


def _instance_normalization(input: Tensor, scale: Tensor, B: Tensor, epsilon: float = 1e-5) -> Tensor:
    x, _, _ = _standardised(input, range(2, input.ndim), epsilon)
    return x * _by_channel(scale, x) + _by_channel(B, x)


def _layer_normalization(
    X: Tensor,
    Scale: Tensor,
    B: Tensor | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    x, mean, scale = _standardised(X, range(axis % X.ndim, X.ndim), epsilon)
    return (x * Scale if B is None else x * Scale + B, mean, scale)[:outputs]


def _rms_normalization(X: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return X * X.square().mean(tuple(range(axis % X.ndim, X.ndim)), keepdim=True).add(epsilon).rsqrt() * scale


def _group_normalization(
    X: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    x, _, _ = _standardised(X.reshape(len(X), num_groups, -1), (2,), epsilon)
    x, wide = x.reshape(X.shape), X.shape[1] // len(scale)  # one number a group before opset 21, one a channel since
    return x * _by_channel(scale.repeat_interleave(wide), x) + _by_channel(bias.repeat_interleave(wide), x)


def _lp_normalization(input: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    length = torch.linalg.vector_norm(input, p, axis, keepdim=True)
    return torch.where(length == 0, 0, input / torch.where(length == 0, 1, length))


def _lrn(X: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    around = [0, 0] * (X.ndim - 2) + [(size - 1) // 2, size // 2]
    sums = F.pad(X.square(), around).unfold(1, size, 1).sum(-1)
    return X / (bias + alpha / size * sums) ** beta


# --- resizing --------------------------------------------------------------------------------------------------------


def _resize(
    X: Tensor,
    roi: Floats | None = None,
    scales: Floats | None = None,
    sizes: Ints | None = None,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: Any = None,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    axes = [axis % X.ndim for axis in axes] if axes else list(range(X.ndim))
    lengths = [X.shape[axis] for axis in axes]
    if sizes:
        ratios = [size / n for size, n in zip(sizes, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            one = (min if keep_aspect_ratio_policy == "not_larger" else max)(ratios)
            ratios, sizes = [one] * len(axes), [math.floor(one * n + 0.5) for n in lengths]
    else:
        ratios = list(scales or [])
        sizes = [math.floor(n * ratio) for n, ratio in zip(lengths, ratios, strict=True)]
    for i, (axis, n, size, ratio) in enumerate(zip(axes, lengths, sizes, ratios, strict=True)):
        crop = (roi[i], roi[i + len(axes)]) if roi and coordinate_transformation_mode == "tf_crop_and_resize" else None
        if size == n and ratio == 1 and crop in (None, (0.0, 1.0)):
            continue
        weights, inside = _weights(
            n, size, ratio, mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a,
            bool(exclude_outside), bool(antialias), crop,
        )  # fmt: skip
        X = (X.movedim(axis, -1).to(X.dtype) @ weights.T.to(X)).movedim(-1, axis)
        if crop is not None:
            X = torch.where(inside.to(X.device).reshape([-1] + [1] * (X.ndim - 1 - axis)), X, extrapolation_value)
    return X


@functools.lru_cache(maxsize=64)
def _weights(
    n: int,
    size: int,
    ratio: float,
    mode: str,
    coordinates: str,
    nearest_mode: str,
    a: float,
    exclude_outside: bool,
    antialias: bool,
    crop: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """([size, n]: what each new number takes of each old one, [size]: whether its place lies within the old ones)."""
    i = torch.arange(size, dtype=torch.float64)
    if coordinates == "asymmetric":
        at = i / ratio
    elif coordinates == "align_corners":
        _refuse(abs(ratio * n - size) > 1e-3, f"align_corners to {ratio * n:g} places, which is no whole number,")
        at = i * (n - 1) / (size - 1) if size > 1 else 0 * i
    elif coordinates == "tf_crop_and_resize":
        start, end = crop or (0.0, 1.0)
        at = (
            start * (n - 1) + i * (end - start) * (n - 1) / (size - 1)
            if size > 1
            else 0 * i + (start + end) * (n - 1) / 2
        )
    else:
        at = (i + 0.5) / ratio - 0.5
        if coordinates == "half_pixel_symmetric":
            at = at + n / 2 * (1 - size / (ratio * n))
        elif coordinates == "pytorch_half_pixel":
            at = at if size > 1 else 0 * i
        else:
            _refuse(coordinates != "half_pixel", f"coordinate_transformation_mode {coordinates!r}")
    inside = (at >= 0) & (at <= n - 1)
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": (at - 0.5).ceil(), "round_prefer_ceil": (at + 0.5).floor(),
            "floor": at.floor(), "ceil": at.ceil(),
        }[nearest_mode]  # fmt: skip
        return F.one_hot(rounded.long().clamp(0, n - 1), n).float(), inside
    _refuse(mode not in ("linear", "cubic"), f"resizing of mode {mode!r}")
    stretch = max(1 / ratio, 1.0) if antialias else 1.0
    margin = math.ceil(2 * stretch) + 2
    d = ((at[:, None] - torch.arange(-margin, n + margin)) / stretch).abs()
    if mode == "linear":
        wide = (1 - d).clamp_min(0)
    else:
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        wide = torch.where(d <= 1, near, torch.where(d < 2, far, 0))
    if exclude_outside:
        wide[:, :margin] = wide[:, margin + n :] = 0
    if exclude_outside or antialias:
        wide = wide / wide.sum(1, keepdim=True)
    found = wide[:, margin : margin + n].clone()
    found[:, 0] += wide[:, :margin].sum(1)
    found[:, -1] += wide[:, margin + n :].sum(1)
    return found.float(), inside


def _resize_by_scales(X: Tensor, scales: Floats, mode: str = "nearest") -> Tensor:
    return _resize(X, None, scales, None, mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def _grid_sample(
    X: Tensor, grid: Tensor, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(X, grid, mode, padding_mode, bool(align_corners))


# --- recurrence ------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _recurrent(
    kind: str, gates: int, X: Tensor, W: Tensor, R: Tensor, B: Tensor | None, initial: list[Any], **options: Any
) -> Any:
    """Y [T, directions, B, H] and the last state of each kind [directions, B, H]."""
    directions, hidden = W.shape[0], R.shape[-1]
    _refuse(options["clip"] is not None, f"{kind} with a clip")
    _refuse(bool(options["layout"]), f"{kind} of layout 1")
    _refuse(
        options["activations"] not in (None, list(_ACTIVATIONS[kind]) * directions),
        f"{kind} with activations {options['activations']}",
    )
    lengths = options["sequence_lens"]
    _refuse(lengths is not None and any(n != len(X) for n in lengths), f"{kind} of sequences of several lengths")
    outputs, last = [], []
    for d in range(directions):
        back = options["direction"] == "reverse" or d == 1
        both = X.new_zeros(2, gates * hidden) if B is None else B[d].reshape(2, -1)
        inputs = (X.flip(0) if back else X) @ W[d].T + both[0]
        state = tuple(X.new_zeros(X.shape[1], hidden) if s is None else s[d] for s in initial)
        steps = []
        for x in inputs:
            state = _STEPS[kind](x, R[d], both[1], state, options)
            steps.append(state[0])
        y = torch.stack(steps)
        outputs.append(y.flip(0) if back else y)
        last.append(state)
    return (torch.stack(outputs, 1), *(torch.stack(states) for states in zip(*last, strict=True)))[: options["outputs"]]


def _lstm_step(x: Tensor, R: Tensor, bias: Tensor, state: tuple[Tensor, ...], options: Any) -> tuple[Tensor, ...]:
    h, c = state
    i, o, f, g = (x + h @ R.T + bias).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, R: Tensor, bias: Tensor, state: tuple[Tensor, ...], options: Any) -> tuple[Tensor, ...]:
    (h,) = state
    (xz, xr, xh), (Rz, Rr, Rh), (bz, br, bh) = x.chunk(3, -1), R.chunk(3), bias.chunk(3)
    z, r = (xz + h @ Rz.T + bz).sigmoid(), (xr + h @ Rr.T + br).sigmoid()
    new = (xh + (r * (h @ Rh.T + bh) if options["linear_before_reset"] else (r * h) @ Rh.T + bh)).tanh()
    return ((1 - z) * new + z * h,)


def _rnn_step(x: Tensor, R: Tensor, bias: Tensor, state: tuple[Tensor, ...], options: Any) -> tuple[Tensor, ...]:
    return ((x + state[0] @ R.T + bias).tanh(),)


_STEPS: dict[str, Any] = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def _lstm(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    P: Tensor | None = None,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Any = None,
    clip: float | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    _refuse(P is not None or bool(input_forget), "LSTM with peepholes or input_forget")
    return _recurrent(
        "LSTM", 4, X, W, R, B, [initial_h, initial_c], sequence_lens=sequence_lens, direction=direction,
        activations=activations, clip=clip, layout=layout, outputs=outputs,
    )  # fmt: skip


def _gru(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Any = None,
    clip: float | None = None,
    linear_before_reset: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    return _recurrent(
        "GRU", 3, X, W, R, B, [initial_h], sequence_lens=sequence_lens, direction=direction, activations=activations,
        clip=clip, layout=layout, outputs=outputs, linear_before_reset=linear_before_reset,
    )  # fmt: skip


def _rnn(
    X: Tensor,
    W: Tensor,
    R: Tensor,
    B: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    hidden_size: int = 0,
    direction: str = "forward",
    activations: Any = None,
    clip: float | None = None,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    return _recurrent(
        "RNN", 1, X, W, R, B, [initial_h], sequence_lens=sequence_lens, direction=direction, activations=activations,
        clip=clip, layout=layout, outputs=outputs,
    )  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish,
    "Identity": lambda x: x, "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg,
    "NonZero": lambda x: torch.nonzero(x).T, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan,
    "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "MatMul": torch.matmul,
    "Mul": torch.mul, "Or": torch.logical_or, "Sub": torch.sub, "Xor": torch.logical_xor,
}  # fmt: skip
OPERATORS: dict[str, Operator] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{
        name: _reduction(function)
        for name, function in {
            "ReduceL1": lambda x, axes: x.abs().sum(axes, keepdim=True),
            "ReduceL2": lambda x, axes: torch.linalg.vector_norm(x, 2, axes, keepdim=True),
            "ReduceLogSum": lambda x, axes: x.sum(axes, keepdim=True).log(),
            "ReduceLogSumExp": lambda x, axes: x.logsumexp(axes, keepdim=True),
            "ReduceMax": lambda x, axes: x.amax(axes, keepdim=True),
            "ReduceMean": lambda x, axes: x.mean(axes, keepdim=True),
            "ReduceMin": lambda x, axes: x.amin(axes, keepdim=True),
            "ReduceProd": _prod,
            "ReduceSum": lambda x, axes: x.sum(axes, keepdim=True),
            "ReduceSumSquare": lambda x, axes: x.square().sum(axes, keepdim=True),
        }.items()
    },
    "ArgMax": _extreme(True), "ArgMin": _extreme(False), "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization, "Cast": _cast, "CastLike": _cast_like, "Celu": _celu, "Clip": _clip,
    "Concat": _concat, "Constant": _constant, "ConstantOfShape": _constant_of_shape, "Conv": _conv,
    "ConvTranspose": _conv_transpose, "CumSum": _cum_sum, "DepthToSpace": _depth_to_space, "Div": _div,
    "Dropout": _dropout, "Einsum": _einsum, "Elu": _elu, "Expand": _expand, "Flatten": _flatten, "GRU": _gru,
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd, "Gelu": _gelu, "Gemm": _gemm,
    "GlobalAveragePool": _over_space(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": _over_space(lambda x, axes: x.amax(axes, keepdim=True)), "GridSample": _grid_sample,
    "GroupNormalization": _group_normalization, "HardSigmoid": _hard_sigmoid,
    "InstanceNormalization": _instance_normalization, "IsInf": _is_inf, "LRN": _lrn, "LSTM": _lstm,
    "LayerNormalization": _layer_normalization, "LeakyRelu": _leaky_relu, "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization, "Max": _max, "MaxPool": _max_pool, "Mean": _mean, "Min": _min, "Mod": _mod,
    "OneHot": _one_hot, "PRelu": _prelu, "Pad": _pad, "Pow": _pow, "RMSNormalization": _rms_normalization,
    "RNN": _rnn, "Range": _range, "Reshape": _reshape, "Resize": _resize, "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd, "Selu": _selu, "Shape": _shape, "Shrink": _shrink, "Size": _size, "Slice": _slice,
    "Softmax": _softmax, "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Sum": _sum,
    "Swish": _swish, "ThresholdedRelu": _thresholded_relu, "Tile": _tile, "TopK": _top_k, "Transpose": _transpose,
    "Trilu": _trilu, "Unsqueeze": _unsqueeze, "Upsample": _resize_by_scales,
    "Where": lambda condition, X, Y: torch.where(condition, X, Y),
}  # fmt: skip

_BEFORE: dict[str, tuple[int, Operator]] = {  # the version that changed its meaning, what it was before
    "LogSoftmax": (13, _flat_from(torch.log_softmax)),
    "Resize": (11, _resize_by_scales),
    "Softmax": (13, _flat_from(torch.softmax)),
    "TopK": (10, _top_k_of_attribute),
}
