"""One node of an ONNX graph in torch's terms, and the registry its operators are written into."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
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
    """How an operator runs and which of its inputs may be trained.

    `fixed` inputs are never trained: shapes, bounds, statistics. `weights` are trained whatever their size. A constant
    in any other slot is trained if it has more than one element. A `view` hands its first input on, rearranged.
    `only` lists the attribute values that are implemented, where not all of them are.
    """

    run: Run
    fixed: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    view: bool = False
    several: bool = False  # outputs beyond the first are computed
    inputs: int | None = None  # how many are implemented, where not all of them are
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Operators(dict[str, Operator]):
    """op_type -> Operator, for the domain ai.onnx."""

    def register(self, *op_types: str, **properties: Any) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self.update({op_type: Operator(run=run, **properties) for op_type in op_types})
            return run

        return add


def to_tensor(proto: TensorProto) -> Tensor:
    """A copy of an ONNX tensor; raises ValueError for a type that torch has not or for data that is not there."""
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
    """The raw_data of a tensor: its elements in row-major order, little endian."""
    tensor = tensor.detach().cpu().contiguous()
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_attribute(proto: onnx.AttributeProto) -> Any:
    """Text for bytes, torch tensors for tensors; numbers and subgraphs as they are."""
    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, TensorProto):
        return to_tensor(value)
    return value
