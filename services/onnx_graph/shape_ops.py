"""ONNX operators that move elements, and the integer arithmetic of shapes.

Their source is https://onnx.ai/onnx/operators. Shapes stay tensors and are computed anew in each forward pass, because
a graph may be run with any batch size.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.onnx_graph.graph import Node, Operators

SHAPE = Operators()
_register = SHAPE.register


def _ints(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1).tolist()]


def _chosen(node: Node, attribute: str, given: Tensor | None) -> list[int] | None:
    """Return integers that are an input or, in old opsets, an attribute.

    Returns None when there is neither.
    """
    listed = node.get(attribute) if given is None else _ints(given)
    return None if listed is None else list(listed)


@_register("Identity", view=True)
def _identity(_node: Node, x: Tensor) -> Tensor:
    return x


@_register("Dropout", view=True, fixed=(1, 2))
def _dropout(_node: Node, x: Tensor, *_ratio_and_mode: Tensor | None) -> Tensor:
    return x  # the network is corrected as it is served


@_register("Flatten", view=True)
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


@_register("Reshape", view=True, fixed=(1,))
def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = _ints(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[axis] if n == 0 else n for axis, n in enumerate(wanted)]
    return x.reshape(wanted)


@_register("Transpose", view=True)
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or tuple(reversed(range(x.ndim))))


@_register("Squeeze", view=True, fixed=(1,))
def _squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _chosen(node, "axes", axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@_register("Unsqueeze", view=True, fixed=(1,))
def _unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _chosen(node, "axes", axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@_register("Expand", view=True, fixed=(1,))
def _expand(_node: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(_ints(shape))))  # a 1 in the shape keeps the axis


@_register("Tile", view=True, fixed=(1,))
def _tile(_node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(_ints(repeats))


@_register("Concat")
def _concat(node: Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node.get("axis"))


@_register("Split", fixed=(1,), several=True)
def _split(node: Node, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = node.get("axis", 0)
    chosen = _chosen(node, "split", sizes)
    return torch.split(x, chosen or -(-x.shape[axis] // len(node.outputs)), axis)


@_register("Slice", view=True, fixed=(1, 2, 3, 4))
def _slice(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    begins, stops = _chosen(node, "starts", starts) or [], _chosen(node, "ends", ends) or []  # inputs since opset 10
    chosen = _chosen(node, "axes", axes) or range(len(begins))
    strides = _chosen(node, "steps", steps) or [1] * len(begins)
    for axis, begin, stop, step in zip(chosen, begins, stops, strides, strict=True):
        x = _slice_axis(x, axis, slice(begin, stop, step))
    return x


def _slice_axis(x: Tensor, axis: int, wanted: slice) -> Tensor:
    begin, stop, step = wanted.indices(x.shape[axis])
    if step == 1:
        return x.narrow(axis, begin, max(stop - begin, 0))
    # torch has no negative steps
    return x.index_select(axis, torch.arange(begin, stop, step, device=x.device)[: len(range(begin, stop, step))])


@_register("Gather")
def _gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.ndim
    index = indices.long() % x.shape[axis]  # negative ones count from the end
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@_register("Shape")
def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end")], dtype=torch.int64)


@_register("Size")
def _size(_node: Node, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@_register("ConstantOfShape", fixed=(0,))
def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value: Tensor = node.get("value", torch.zeros(1))
    return torch.full(_ints(shape), value.item(), dtype=value.dtype)


@_register("Range", fixed=(0, 1, 2))
def _range(_node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, end, step = start.item(), limit.item(), delta.item()
    return first + step * torch.arange(max(math.ceil((end - first) / step), 0)).to(start.dtype)


@_register("Pad", fixed=(1, 2, 3), only={"mode": ("constant", "reflect", "edge", "wrap")})
def _pad(
    node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = _chosen(node, "pads", pads) or []  # an input since opset 11, as is the value
    chosen = range(x.ndim) if axes is None else _ints(axes)
    begin, end = [0] * x.ndim, [0] * x.ndim
    for position, axis in enumerate(chosen):
        begin[axis], end[axis] = widths[position], widths[position + len(chosen)]
    if node.get("mode", "constant") != "constant":
        return _pad_by_copies(node.get("mode"), x, begin, end)
    pairs = itertools.chain.from_iterable(zip(reversed(begin), reversed(end), strict=True))
    return F.pad(x, list(pairs), value=node.get("value", 0.0) if value is None else value.item())


def _pad_by_copies(mode: str, x: Tensor, begin: Sequence[int], end: Sequence[int]) -> Tensor:
    for axis, (before, after) in enumerate(zip(begin, end, strict=True)):
        if before or after:
            at = torch.arange(-before, x.shape[axis] + after, device=x.device)
            x = x.index_select(axis, _source(mode, at, x.shape[axis]))
    return x


def _source(mode: str, at: Tensor, size: int) -> Tensor:
    """Return the source position of positions that may lie outside."""
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return at % size
    period = max(2 * (size - 1), 1)
    at = at % period
    return torch.minimum(at, period - at)  # reflected at the last element, which is not repeated


@_register("DepthToSpace")
def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    block = node.get("blocksize")
    depth = channels // block**2
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(batch, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, depth, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, depth, height * block, width * block)


@_register("SpaceToDepth")
def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    batch, depth, height, width = x.shape
    block = node.get("blocksize")
    x = x.reshape(batch, depth, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, depth * block**2, height // block, width // block)
