"""An ONNX graph read for execution: its tensors, its image input and the nodes that its first output needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import AttributeProto, TensorProto, inliner
from torch import Tensor

from services.corrector.onnx_node import Node, to_attribute, to_tensor


@dataclass(frozen=True, kw_only=True)
class Graph:
    image: str
    output: str
    nodes: tuple[Node, ...]  # in an order that can be run; Constant nodes are in `constants`
    constants: dict[str, Tensor]  # value name -> tensor
    writable: frozenset[str]  # the constants that `stored_tensors` finds in the model itself


def stored_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """The initializers and Constant tensors of a model by value name, as references into it."""
    for initializer in model.graph.initializer:
        yield initializer.name, initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t


def read_graph(model: onnx.ModelProto) -> Graph:
    """Raises ValueError for several inputs, missing external data or tensor types that torch has not."""
    writable = frozenset(name for name, _ in stored_tensors(model))
    model = inliner.inline_local_functions(model) if model.functions else model
    if model.graph.sparse_initializer:
        raise ValueError("the model has sparse initializers; export it with dense ones")
    output = model.graph.output[0].name
    needed, protos = _needed(model.graph.node, output)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return Graph(
        image=_image(model),
        output=output,
        nodes=tuple(_read_node(proto, opsets, needed) for proto in protos if proto.op_type != "Constant"),
        constants=_constants(model, protos, needed),
        writable=writable,
    )


def _image(model: onnx.ModelProto) -> str:
    stored = {initializer.name for initializer in model.graph.initializer}  # IR 3 lists initializers as inputs too
    inputs = [value.name for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise ValueError(f"the model has the inputs {inputs}; an image classifier has exactly one")
    return inputs[0]


def _needed(nodes: Sequence[onnx.NodeProto], output: str) -> tuple[set[str], list[onnx.NodeProto]]:
    """The values and nodes that `output` depends on. A second head may be anything, it is not run."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return needed, kept[::-1]


def _read_node(proto: onnx.NodeProto, opsets: dict[str, int], needed: set[str]) -> Node:
    return Node(
        op_type=proto.op_type,
        name=proto.name,
        domain=proto.domain,
        opset=opsets.get(proto.domain or "ai.onnx", 0),
        inputs=tuple(proto.input),
        outputs=tuple(name if name in needed else "" for name in proto.output),
        attributes={attribute.name: to_attribute(attribute) for attribute in proto.attribute},
    )


def _constants(model: onnx.ModelProto, protos: Sequence[onnx.NodeProto], needed: set[str]) -> dict[str, Tensor]:
    constants = {proto.name: to_tensor(proto) for proto in model.graph.initializer if proto.name in needed}
    for proto in protos:
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(proto.output[0], proto.attribute[0])
    return constants


def _constant(name: str, attribute: AttributeProto) -> Tensor:
    """Constant says its value as a tensor, a number or a list of numbers."""
    if attribute.name == "value":
        return to_tensor(attribute.t)
    if attribute.name in {"value_float", "value_floats"}:
        return torch.tensor(to_attribute(attribute), dtype=torch.float32)
    if attribute.name in {"value_int", "value_ints"}:
        return torch.tensor(to_attribute(attribute), dtype=torch.int64)
    raise ValueError(f"constant {name!r} holds a {attribute.name}; only numeric constants are supported")
