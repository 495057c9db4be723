"""An ONNX graph, read for execution.

It has nodes in torch terms, constant tensors, the image input, and only the needed nodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, TensorProto, inliner, numpy_helper
from torch import Tensor

DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}

Run = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Node:
    op_type: str
    name: str
    domain: str
    opset: int  # of the node's domain: an operator's meaning depends on it
    inputs: tuple[str, ...]  # "" where an optional input is left out
    outputs: tuple[str, ...]  # "" where nobody reads the output
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        return self.attributes.get(attribute, default)

    def __str__(self) -> str:
        return f"{self.op_type} (node {self.name!r}, domain {self.domain or 'ai.onnx'!r}, opset {self.opset})"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The implementation of an operator, and its trainable inputs.

    `fixed` inputs are never trained: shapes, bounds, statistics. `weights` are trained
    whatever their size. A constant in any other slot is trained when it has more than
    one element. A `view` returns its first input, rearranged. `only` lists the
    implemented attribute values, when not all of them are.
    """

    run: Run
    fixed: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    view: bool = False
    several: bool = False  # outputs beyond the first are computed
    inputs: int | None = None  # how many are implemented, where not all of them are
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Operators(dict[str, Operator]):
    """The map from op_type to Operator, for the domain ai.onnx."""

    def register(self, *op_types: str, **properties: Any) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self.update({op_type: Operator(run=run, **properties) for op_type in op_types})
            return run

        return add


def to_tensor(proto: TensorProto) -> Tensor:
    """Return a copy of an ONNX tensor.

    Raises ValueError for a type that torch does not have, or missing data.
    """
    if proto.data_location == TensorProto.EXTERNAL:
        raise ValueError(
            f"tensor {proto.name!r} is stored outside the model file; load the model with onnx.load from the folder "
            "that holds its external data"
        )
    if proto.data_type not in DTYPES:
        raise ValueError(f"tensor {proto.name!r} has the unsupported type {TensorProto.DataType.Name(proto.data_type)}")
    array = np.ascontiguousarray(numpy_helper.to_array(proto)).reshape(tuple(proto.dims))
    if proto.data_type == TensorProto.BFLOAT16:  # numpy has no such type: the bits travel as integers
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_bytes(tensor: Tensor) -> bytes:
    """Return the raw_data of a tensor.

    It has the elements in row-major order, little endian.
    """
    tensor = tensor.detach().cpu().contiguous()
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_attribute(proto: onnx.AttributeProto) -> Any:
    """Return the value of an attribute.

    Bytes become text, and tensors become torch tensors. Numbers and subgraphs stay as they are.
    """
    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, TensorProto):
        return to_tensor(value)
    return value


@dataclass(frozen=True, kw_only=True)
class Graph:
    image: str
    output: str
    nodes: tuple[Node, ...]  # in an order that can be run; Constant nodes are in `constants`
    constants: dict[str, Tensor]  # value name -> tensor
    writable: frozenset[str]  # the constants that `stored_tensors` finds in the model itself


def stored_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield references to initializers and Constant tensors, with value names."""
    for initializer in model.graph.initializer:
        yield initializer.name, initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t


def read_graph(model: onnx.ModelProto) -> Graph:
    """Return the graph of a model.

    Raises ValueError for several inputs, missing external data or unsupported tensor types.
    """
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
    """Return the values and nodes that `output` depends on.

    Further heads of the graph are not run.
    """
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
    """Return the value of a Constant node.

    It is a tensor, a number or a list of numbers.
    """
    if attribute.name == "value":
        return to_tensor(attribute.t)
    if attribute.name in {"value_float", "value_floats"}:
        return torch.tensor(to_attribute(attribute), dtype=torch.float32)
    if attribute.name in {"value_int", "value_ints"}:
        return torch.tensor(to_attribute(attribute), dtype=torch.int64)
    raise ValueError(f"constant {name!r} holds a {attribute.name}; only numeric constants are supported")
