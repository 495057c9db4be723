"""ONNX operators over images: convolution, pooling, normalisation, resizing.

Their source is https://onnx.ai/onnx/operators. Tensors are [batch, channel, *spatial] with one, two or three spatial
axes. A pad, a stride or a kernel size is given per spatial axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.onnx_graph.graph import Node, Operators

SPATIAL = Operators()
_register = SPATIAL.register

_CONV: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX_POOL: Mapping[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: Mapping[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
_NEAREST: Mapping[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


@dataclass(frozen=True, kw_only=True)
class _Window:
    """The path of a kernel over an image.

    Each field has one number per spatial axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]  # padding before the image
    end: tuple[int, ...]  # padding after it

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def _window(node: Node, size: Sequence[int], kernel: Sequence[int]) -> _Window:
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    stride, dilation = tuple(node.get("strides") or ones), tuple(node.get("dilations") or ones)
    window = _Window(kernel=tuple(kernel), stride=stride, dilation=dilation, begin=zeros, end=zeros)
    auto_pad = node.get("auto_pad", "NOTSET")
    if auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
        return _split_padding(window, _same_padding(window, size), upper=auto_pad == "SAME_UPPER")
    pads = tuple(node.get("pads") or zeros + zeros) if auto_pad == "NOTSET" else zeros + zeros
    return replace(window, begin=pads[: len(kernel)], end=pads[len(kernel) :])


def _same_padding(window: _Window, size: Sequence[int]) -> list[int]:
    """Return the padding that gives ceil(size / stride) outputs."""
    axes = zip(size, window.stride, window.extent, strict=True)
    return [max((-(-n // stride) - 1) * stride + extent - n, 0) for n, stride, extent in axes]


def _split_padding(window: _Window, total: Sequence[int], *, upper: bool) -> _Window:
    half = tuple(pad // 2 for pad in total)
    rest = tuple(pad - pad // 2 for pad in total)
    return replace(window, begin=half, end=rest) if upper else replace(window, begin=rest, end=half)


def _pad(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes; negative numbers crop them."""
    pairs = [pad for pair in zip(reversed(begin), reversed(end), strict=True) for pad in pair]
    return F.pad(x, pairs, value=value) if any(pairs) else x


@_register("Conv", weights=(1, 2))
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = _window(node, x.shape[2:], weight.shape[2:])
    padding = window.begin
    if window.begin != window.end:  # torch pads both sides alike
        x, padding = _pad(x, window.begin, window.end), (0,) * len(padding)
    return _CONV[len(padding)](x, weight, bias, window.stride, padding, window.dilation, node.get("group", 1))


@_register("ConvTranspose", weights=(1, 2))
def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    extra = tuple(node.get("output_padding") or (0,) * rank)
    full = _window(replace(node, attributes={**node.attributes, "auto_pad": "VALID"}), x.shape[2:], weight.shape[2:])
    group = node.get("group", 1)
    y = _CONV_TRANSPOSE[rank](x, weight, None, full.stride, 0, extra, group, full.dilation)
    begin, end = _crop(node, full, x.shape[2:], y.shape[2:])
    # The bias comes last: an output_shape larger than the full one is filled with it.
    y = _pad(y, [-pad for pad in begin], [-pad for pad in end])
    return y if bias is None else y + bias.view(-1, *[1] * rank)


def _crop(node: Node, full: _Window, size: Sequence[int], got: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the crop of a ConvTranspose, before and after.

    It is given by the pads, or by the output_shape.
    """
    auto_pad, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [n * stride for n, stride in zip(size, full.stride, strict=True)]
    if wanted is None:
        padded = _window(node, size, full.kernel)
        return padded.begin, padded.end
    total = [n - want for n, want in zip(got, list(wanted)[-len(got) :], strict=True)]
    split = _split_padding(full, [max(n, 0) for n in total], upper=auto_pad == "SAME_UPPER")
    return split.begin, tuple(end + min(n, 0) for end, n in zip(split.end, total, strict=True))  # grown at the end


def _overhang(node: Node, size: Sequence[int], window: _Window) -> list[int]:
    """Return how far a ceil_mode pool's last window exceeds the padding.

    Every window starts inside the image.
    """
    if not node.get("ceil_mode", 0):
        return [0] * len(size)
    overhangs = []
    for n, stride, extent, begin, end in zip(size, window.stride, window.extent, window.begin, window.end, strict=True):
        windows = -(-(n + begin + end - extent) // stride) + 1
        windows -= (windows - 1) * stride >= n + begin
        overhangs.append(max((windows - 1) * stride + extent - n - begin - end, 0))
    return overhangs


@_register("MaxPool", only={"storage_order": (0,)})
def _max_pool(node: Node, x: Tensor) -> Tensor:
    size = x.shape[2:]
    window = _window(node, size, node.get("kernel_shape"))
    end = [pad + over for pad, over in zip(window.end, _overhang(node, size, window), strict=True)]
    x = _pad(x, window.begin, end, -torch.inf)
    return _MAX_POOL[len(size)](x, window.kernel, window.stride, dilation=window.dilation)


@_register("AveragePool", only={"dilations": ([1], [1, 1], [1, 1, 1])})
def _average_pool(node: Node, x: Tensor) -> Tensor:
    size = x.shape[2:]
    window = _window(node, size, node.get("kernel_shape"))
    over = _overhang(node, size, window)
    pool, zeros = _AVG_POOL[len(size)], [0] * len(size)
    y = pool(_pad(_pad(x, window.begin, window.end), zeros, over), window.kernel, window.stride)
    if not any((*window.begin, *window.end, *over)):
        return y
    counted = x.new_ones((1, 1, *size))  # which elements the mean is over: never the overhang
    counted = _pad(counted, window.begin, window.end, float(node.get("count_include_pad", 0)))
    return y / pool(_pad(counted, zeros, over), window.kernel, window.stride)


@_register("GlobalAveragePool")
def _global_average_pool(_node: Node, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@_register("GlobalMaxPool")
def _global_max_pool(_node: Node, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@_register("BatchNormalization", weights=(1, 2), fixed=(3, 4), only={"training_mode": (0,), "spatial": (1,)})
def _batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5))


@_register("InstanceNormalization", weights=(1, 2))
def _instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


@_register("GroupNormalization", weights=(1, 2))
def _group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if node.opset < 21:  # one scale per group; since opset 21 one per channel
        scale, bias = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, bias))  # [channel]
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


@_register("LayerNormalization", weights=(1, 2))
def _layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = node.get("axis", -1) % x.ndim
    y = F.layer_norm(x, x.shape[axis:], eps=node.get("epsilon", 1e-5)) * scale  # ONNX broadcasts, torch does not
    return y if bias is None else y + bias


@_register("LRN")
def _local_response_norm(node: Node, x: Tensor) -> Tensor:
    size = node.get("size")
    squares = _pad(x.square().flatten(2).unsqueeze(1), [(size - 1) // 2, 0], [size // 2, 0])  # [batch, 1, channel, n]
    mean = F.avg_pool2d(squares, (size, 1), 1).view(x.shape)
    scale = mean.mul(node.get("alpha", 1e-4)).add(node.get("bias", 1.0)).pow(node.get("beta", 0.75))
    return x / scale


_RESIZE_ONLY: Mapping[str, Sequence[Any]] = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode": _COORDINATES,
    "nearest_mode": tuple(_NEAREST),
    "antialias": (0,),
    "exclude_outside": (0,),
    "keep_aspect_ratio_policy": ("stretch",),
}


@_register("Resize", fixed=(1, 2, 3), only=_RESIZE_ONLY)
def _resize(
    node: Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    scales = roi if node.opset < 11 else scales  # opset 10 has no roi
    legacy = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if node.opset < 11 else {}
    axes = [axis % x.ndim for axis in node.get("axes") or range(x.ndim)]
    if sizes is not None and sizes.numel():
        targets = [int(n) for n in sizes.tolist()]
        factors = [n / x.shape[axis] for n, axis in zip(targets, axes, strict=True)]
    else:
        assert scales is not None
        factors = [float(factor) for factor in scales.tolist()]
        targets = [int(factor * x.shape[axis]) for factor, axis in zip(factors, axes, strict=True)]
    return _resize_axes(replace(node, attributes={**legacy, **node.attributes}), x, axes, targets, factors)


@_register("Upsample", fixed=(1,), only={"mode": ("nearest", "linear", "bilinear")})
def _upsample(node: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    factors = list(node.get("scales") if scales is None else scales.tolist())  # an attribute before opset 9
    mode = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", **node.attributes}
    targets = [int(factor * n) for factor, n in zip(factors, x.shape, strict=True)]
    return _resize_axes(replace(node, attributes=mode), x, range(x.ndim), targets, factors)


def _resize_axes(
    node: Node, x: Tensor, axes: Sequence[int], targets: Sequence[int], factors: Sequence[float]
) -> Tensor:
    """Resize one axis after the other.

    Both modes are separable.
    """
    for axis, target, factor in zip(axes, targets, factors, strict=True):
        if factor != 1 or target != x.shape[axis]:
            source = _source(node, x.shape[axis], target, factor).to(x.device)  # [target]
            x = _sample(node, x, axis, source)
    return x


def _source(node: Node, size: int, target: int, factor: float) -> Tensor:
    """Return the position of each resized element in the original axis."""
    at = torch.arange(target, dtype=torch.float64)
    mode = node.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * (size - 1) / max(target - 1, 1)
    if mode == "pytorch_half_pixel" and target == 1:
        return torch.zeros_like(at)
    return (at + 0.5) / factor - 0.5


def _sample(node: Node, x: Tensor, axis: int, source: Tensor) -> Tensor:
    last = x.shape[axis] - 1
    if node.get("mode", "nearest") == "nearest":
        nearest = _NEAREST[node.get("nearest_mode", "round_prefer_floor")](source)
        return x.index_select(axis, nearest.long().clamp(0, last))
    low = source.floor()
    fraction = (source - low).to(x.dtype).view(-1, *[1] * (x.ndim - axis - 1))  # along `axis`
    below, above = (x.index_select(axis, (low.long() + step).clamp(0, last)) for step in (0, 1))
    return torch.lerp(below, above, fraction)
