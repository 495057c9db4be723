"""An ONNX image classifier as a torch module: the very weights that are deployed, trained and written back."""

import re
from collections.abc import Sequence

import onnx
from onnx import TensorProto
from torch import Tensor, nn

from services.onnx_graph.graph import Node, read_graph, stored_tensors, to_bytes, to_tensor
from services.onnx_graph.operators import OPERATORS, UnsupportedOperator, check
from services.onnx_graph.parameters import last_layer, learnable

__all__ = ["OnnxModule", "UnsupportedOperator"]

_DATA_FIELDS = ("float_data", "double_data", "int32_data", "raw_data")


class OnnxModule(nn.Module):
    """Run a graph as it is served; its weights are the module's parameters, its other floats the buffers.

    BatchNormalization and Dropout are in inference mode whatever the mode of the module. Integers and booleans are
    plain tensors that stay on the CPU, where shapes are computed.
    Raises UnsupportedOperator for a node that has no equivalent here, and ValueError for a model with several inputs,
    with missing external data or with a tensor type that torch has not.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = read_graph(self._model)
        for node in graph.nodes:
            check(node)
        self._image, self._output, self._nodes = graph.image, graph.output, graph.nodes
        self._last_uses = _last_uses(graph.nodes, graph.output)
        self._held: dict[str, str] = {}  # value name -> name of the parameter or buffer
        self._integers: dict[str, Tensor] = {}
        weights = learnable(graph)
        for name, tensor in graph.constants.items():
            self._hold(name, tensor, trained=name in weights)
        # Names of the parameters of the last layer; none for a graph that ends otherwise.
        self.last_layer = frozenset(self._held[name] for name in last_layer(graph, weights))

    def _hold(self, name: str, tensor: Tensor, *, trained: bool) -> None:
        if not tensor.is_floating_point():
            self._integers[name] = tensor
            return
        self._held[name] = attribute = self._free_name(name)
        if trained:
            self.register_parameter(attribute, nn.Parameter(tensor))
        else:
            self.register_buffer(attribute, tensor)

    def _free_name(self, name: str) -> str:
        """An attribute name like the value's, which torch and this module do not use yet."""
        free = re.sub(r"\W", "_", name)
        while not free or hasattr(self, free):
            free += "_"
        return free

    def forward(self, images: Tensor) -> Tensor:
        """The first output, for images shaped as the model's input."""
        values = {self._image: images, **self._integers}
        values.update({name: getattr(self, attribute) for name, attribute in self._held.items()})
        for node, finished in zip(self._nodes, self._last_uses, strict=True):
            values.update(_run(node, values))
            for name in finished:
                del values[name]  # without gradients, an activation's memory can be used again
        return values[self._output]

    def to_onnx(self) -> onnx.ModelProto:
        """The original model with the trained weights; a tensor that has not moved keeps its bytes."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        parameters = dict(self.named_parameters(recurse=False))
        for name, proto in stored_tensors(model):
            if self._held.get(name) in parameters:
                _write(proto, parameters[self._held[name]])
        return model


def _run(node: Node, values: dict[str, Tensor]) -> dict[str, Tensor]:
    operator = OPERATORS[node.op_type]
    inputs = [values[name] if name else None for name in node.inputs]
    results = operator.run(node, *_on_one_device(inputs, operator.fixed))
    listed = (results,) if isinstance(results, Tensor) else results
    return {name: result for name, result in zip(node.outputs, listed, strict=False) if name}


def _on_one_device(inputs: Sequence[Tensor | None], fixed: Sequence[int]) -> list[Tensor | None]:
    """Bring shape arithmetic, which runs on the CPU, to the features that it is combined with."""
    operands = [x for slot, x in enumerate(inputs) if slot not in fixed and x is not None]
    device = next((x.device for x in operands if x.device.type != "cpu"), None)
    if device is None:
        return list(inputs)
    return [x if x is None or slot in fixed else x.to(device) for slot, x in enumerate(inputs)]


def _last_uses(nodes: Sequence[Node], output: str) -> list[tuple[str, ...]]:
    """For each node the values that no later node reads."""
    seen, finished = {output, ""}, []
    for node in reversed(nodes):
        names = {*node.inputs, *node.outputs} - seen
        seen |= names
        finished.append(tuple(names))
    return finished[::-1]


def _write(proto: TensorProto, weight: Tensor) -> None:
    data = to_bytes(weight)
    if data == to_bytes(to_tensor(proto)):
        return
    for field in _DATA_FIELDS:
        proto.ClearField(field)
    proto.raw_data = data
