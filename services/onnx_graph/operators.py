"""The supported ONNX operators, and the check for others."""

from typing import Final

from services.onnx_graph.arithmetic_ops import ARITHMETIC
from services.onnx_graph.graph import Node, Operator
from services.onnx_graph.shape_ops import SHAPE
from services.onnx_graph.spatial_ops import SPATIAL

OPERATORS: Final[dict[str, Operator]] = {**ARITHMETIC, **SPATIAL, **SHAPE}
OLDEST_OPSET = 7  # earlier opsets broadcast by an attribute
NEWEST_OPSET = 28  # the last tested one; a later opset may add attributes that matter
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


class UnsupportedOperator(ValueError):
    """Raised for a graph with a node that cannot run in torch.

    The remedy is an export without it.
    """


def check(node: Node) -> None:
    """Raise UnsupportedOperator for an unsupported operator, attribute or output."""
    if node.op_type in _CONTROL_FLOW:
        raise UnsupportedOperator(
            f"{node} is control flow; only straight graphs can be trained, export the model without it. {_supported()}"
        )
    if node.domain not in {"", "ai.onnx"} or node.op_type not in OPERATORS:
        raise UnsupportedOperator(f"{node} is not supported. {_supported()}")
    if node.opset < OLDEST_OPSET:
        raise UnsupportedOperator(f"{node} predates opset {OLDEST_OPSET}; convert with onnx.version_converter first")
    if node.opset > NEWEST_OPSET:
        raise UnsupportedOperator(f"{node} is newer than opset {NEWEST_OPSET}; export the model for an older one")
    _check_use(node, OPERATORS[node.op_type])


def _check_use(node: Node, operator: Operator) -> None:
    for attribute, allowed in operator.only.items():
        value = node.get(attribute, allowed[0])
        if value not in allowed:
            raise UnsupportedOperator(
                f"{node} has {attribute}={value!r}; supported are {list(allowed)}. {_supported()}"
            )
    if operator.inputs is not None and any(node.inputs[operator.inputs :]):
        raise UnsupportedOperator(f"{node}: only its first {operator.inputs} inputs are supported. {_supported()}")
    if any(node.outputs[1:]) and not operator.several:
        raise UnsupportedOperator(f"{node}: only the first output is supported, the graph reads more. {_supported()}")


def _supported() -> str:
    return f"Supported in the domain ai.onnx: {', '.join(sorted(OPERATORS))}"
