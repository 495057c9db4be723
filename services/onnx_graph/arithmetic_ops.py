"""ONNX operators: elementwise, along an axis, and matrix products.

Their source is https://onnx.ai/onnx/operators. Every function takes its node, then the node's inputs, which are None
where an optional input is left out.
"""

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from services.onnx_graph.graph import DTYPES, Node, Operators, Run

ARITHMETIC = Operators()
_register = ARITHMETIC.register

_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Log": torch.log,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Not": torch.logical_not,
}
_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
}


def _plain(function: Callable[..., Tensor]) -> Run:
    return lambda _node, *values: function(*values)


for _name, _unary in _UNARY.items():
    _register(_name)(_plain(_unary))
for _name, _binary in _BINARY.items():
    _register(_name)(_plain(_binary))


@_register("Div")
def _div(_node: Node, a: Tensor, b: Tensor) -> Tensor:
    # ONNX divides integers like C.
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@_register("Mod")
def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@_register("Pow", fixed=(1,))
def _pow(_node: Node, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


@_register("Sum")
def _sum(_node: Node, *terms: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms)


@_register("Mean")
def _mean(_node: Node, *terms: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms) / len(terms)


@_register("Max", fixed=(0, 1))
def _max(_node: Node, *terms: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, terms)


@_register("Min", fixed=(0, 1))
def _min(_node: Node, *terms: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, terms)


@_register("Clip", fixed=(1, 2))
def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low = _bound(node, "min", x) if low is None else low  # an attribute before opset 11
    high = _bound(node, "max", x) if high is None else high
    return x if low is None and high is None else torch.clamp(x, low, high)


def _bound(node: Node, name: str, x: Tensor) -> Tensor | None:
    return None if node.get(name) is None else x.new_tensor(node.get(name))


@_register("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@_register("PRelu", weights=(1,))
def _prelu(_node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


@_register("Elu")
def _elu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@_register("Celu")
def _celu(node: Node, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@_register("Selu")
def _selu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.6732632)).mul(node.get("gamma", 1.0507010))


@_register("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    return x.mul(node.get("alpha", 0.2)).add(node.get("beta", 0.5)).clamp(0, 1)


@_register("Swish")
def _swish(node: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


@_register("Gelu")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@_register("Softmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    return _along_axis(node, x, torch.softmax)


@_register("LogSoftmax")
def _log_softmax(node: Node, x: Tensor) -> Tensor:
    return _along_axis(node, x, torch.log_softmax)


def _along_axis(node: Node, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim  # before opset 13 all axes from this one on are normalised together
    flat = x.reshape((*x.shape[:axis], -1))
    return function(flat, axis).reshape(x.shape)


@_register("Where", fixed=(0,))
def _where(_node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition.to(a.device), a, b)


@_register("Cast", view=True, only={"to": tuple(DTYPES)})
def _cast(node: Node, x: Tensor) -> Tensor:
    return x.to(DTYPES[node.get("to")])


@_register("CastLike", view=True, fixed=(1,))
def _cast_like(_node: Node, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@_register("Gemm", weights=(0, 1, 2))
def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    product = _scaled(a @ b, node.get("alpha", 1.0))
    return product if c is None else product + _scaled(c, node.get("beta", 1.0))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else factor * x


@_register("MatMul", weights=(0, 1))
def _matmul(_node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@_register("Einsum", weights=(0, 1))
def _einsum(node: Node, *operands: Tensor) -> Tensor:
    return torch.einsum(node.get("equation"), *operands)


_ATTENTION_ONLY = {"softcap": (0.0,), "left_window_size": (-1,), "right_window_size": (-1,)}


@_register("Attention", fixed=(3,), inputs=4, only=_ATTENTION_ONLY)
def _attention(node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    packed = q.ndim == 3  # [batch, token, head * channel] instead of [batch, head, token, channel]
    if packed:
        q = _heads(q, node.get("q_num_heads"))
        k, v = (_heads(x, node.get("kv_num_heads")) for x in (k, v))
    if node.get("is_causal", 0):
        mask = _causal(mask, q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())
    shared = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=node.get("scale"), enable_gqa=shared)
    return y.transpose(1, 2).flatten(2) if packed else y


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)  # [batch, head, token, channel]


def _causal(mask: Tensor | None, past: Tensor) -> Tensor:
    """Return the mask narrowed to each token's past, [token, token]."""
    if mask is None:
        return past
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)


def _prod(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):  # torch reduces a product one axis at a time
        x = x.prod(axis, keepdim=keepdim)
    return x


def _l1(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    return torch.sum(x.abs(), axes, keepdim=keepdim)


def _l2(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim)
    return norm


def _sum_square(x: Tensor, axes: list[int], *, keepdim: bool) -> Tensor:
    return torch.sum(x.square(), axes, keepdim=keepdim)


_REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _prod,
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceSumSquare": _sum_square,
}


@_register(*_REDUCTIONS, fixed=(1,))
def _reduce(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    # The axes became an input with opset 13 (ReduceSum) and 18 (the others).
    chosen = list(node.get("axes") or []) if axes is None else [int(axis) for axis in axes.tolist()]
    if not chosen and node.get("noop_with_empty_axes", 0):
        return x
    # A scalar has no axes to name, and torch calls its only pseudo-axis 0.
    reduction = _REDUCTIONS[node.op_type]
    return reduction(x, chosen or list(range(x.ndim)), keepdim=bool(node.get("keepdims", 1)))


@_register("ArgMax", only={"select_last_index": (0,)})
def _argmax(node: Node, x: Tensor) -> Tensor:
    return torch.argmax(x, node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))
