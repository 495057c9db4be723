"""An ONNX image classifier as a torch module.

The deployed weights are its parameters.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum, auto

import onnx
from onnx import TensorProto
from torch import Tensor, nn

from services.onnx_graph.graph import Graph, Node, read_graph, stored_tensors, to_bytes, to_tensor
from services.onnx_graph.operators import OPERATORS, UnsupportedOperator, check

_MASKED = -50.0  # exp(-50) vanishes beside 1: an additive attention mask holds 0 and a lower value
_MEASURES = frozenset({"Shape", "Size"})  # whose result does not depend on the content
# Operators of a layer's matrix.
_PRODUCTS = frozenset({"Gemm", "MatMul", "Conv", "Einsum"})
# Operators that may stand between the image and its normalisation.
_PREPROCESSING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Cast", "Clip", "Identity"),
        *("Transpose", "Gather", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Resize", "Pad"),
    }
)


class _Use(Enum):
    FIXED = auto()  # a shape, a bound, a statistic, the image's normalisation
    WEIGHT = auto()
    OPERAND = auto()  # of arithmetic: a weight when it has more than one number


def learnable(graph: Graph) -> frozenset[str]:
    """Return the names of the constants to train.

    A constant is classified by its consumers, through nodes of constants up to the node where it meets the image's
    features. One fixed use makes it fixed.
    """
    features = _reached(graph.image, graph.nodes)
    uses = _uses(graph, features, _preprocessed(graph, features))
    idle = _idle_affines(graph)
    return frozenset(
        name
        for name, tensor in graph.constants.items()
        if name in graph.writable - idle and _trains(tensor, uses[name])
    )


def last_layer(graph: Graph, weights: Collection[str]) -> frozenset[str]:
    """Return the names of the last layer's weights, its matrix and bias.

    The last layer is the last product with features before the output. The result is empty when features are combined
    between that product and the output.
    """
    makers = {output: node for node in graph.nodes for output in node.outputs if output}
    features = _reached(graph.image, graph.nodes)
    found: set[str] = set()
    value = graph.output
    while value in makers:
        node = makers[value]
        found |= _leaves((name for name in node.inputs if name not in features), makers) & set(weights)
        if node.op_type in _PRODUCTS and found:
            return frozenset(found)
        sources = [name for name in node.inputs if name in features]
        if len(sources) != 1:
            break
        value = sources[0]
    return frozenset()


def _leaves(names: Iterable[str], makers: Mapping[str, Node]) -> set[str]:
    """Return the constants that values are computed from."""
    waiting, leaves = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in makers:
            waiting.extend(makers[name].inputs)
        else:
            leaves.add(name)
    return leaves


def _trains(tensor: Tensor, uses: set[_Use]) -> bool:
    if not tensor.is_floating_point() or not tensor.ndim or not uses or _Use.FIXED in uses:
        return False
    return _Use.WEIGHT in uses or (tensor.numel() > 1 and not _is_mask(tensor))


def _idle_affines(graph: Graph) -> set[str]:
    """Return the ones and zeros of normalisations without affine parameters.

    Exporters write such constants.
    """
    normalisations = (node for node in graph.nodes if node.op_type in {"InstanceNormalization", "GroupNormalization"})
    names = {name for node in normalisations for name in node.inputs[1:] if name in graph.constants}
    return {name for name in names if bool((graph.constants[name] == graph.constants[name].reshape(-1)[0]).all())}


def _is_mask(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()
    return bool(low <= _MASKED and ((tensor == low) | (tensor == high)).all())


def _reached(image: str, nodes: Sequence[Node]) -> set[str]:
    """Return the values that depend on the image's content.

    A dependence on its shape alone does not count.
    """
    reached = {image}
    for node in nodes:
        if node.op_type not in _MEASURES and reached.intersection(node.inputs):
            reached.update(filter(None, node.outputs))
    return reached


def _preprocessed(graph: Graph, features: set[str]) -> set[str]:
    """Return the features that are still the image, before the first weight.

    They are rearranged, resized or normalised only.
    """
    raw = {graph.image}
    for node in graph.nodes:
        sources = features.intersection(node.inputs)
        if node.op_type in _PREPROCESSING and sources and sources <= raw:
            raw.update(filter(None, node.outputs))
    return raw


def _uses(graph: Graph, features: set[str], raw: set[str]) -> defaultdict[str, set[_Use]]:
    uses: defaultdict[str, set[_Use]] = defaultdict(set)
    for node in reversed(graph.nodes):
        for slot, name in enumerate(node.inputs):
            if name not in features:
                uses[name] |= _use(node, slot, features, raw, uses)
    return uses


def _use(node: Node, slot: int, features: set[str], raw: set[str], uses: Mapping[str, set[_Use]]) -> set[_Use]:
    operator = OPERATORS[node.op_type]
    if slot in operator.fixed or raw.intersection(node.outputs):
        return {_Use.FIXED}
    if features.isdisjoint(node.outputs):
        later = {use for name in node.outputs if name for use in uses[name]}
        if operator.view or not later or node.op_type in _MEASURES:
            return later if operator.view else set()
        if _Use.FIXED in later:
            return {_Use.FIXED}
    return {_Use.WEIGHT} if slot in operator.weights else {_Use.OPERAND}


__all__ = ["OnnxModule", "UnsupportedOperator"]

_DATA_FIELDS = ("float_data", "double_data", "int32_data", "raw_data")


class OnnxModule(nn.Module):
    """A torch module that runs a graph as it is served.

    Weights are parameters, and other float constants are buffers. BatchNormalization and Dropout are in inference mode,
    whatever the mode of the module. Integers and booleans are plain tensors on the CPU, where shapes are computed.
    Raises UnsupportedOperator for a node without an equivalent here, and ValueError for a model with several inputs,
    missing external data or an unsupported tensor type.
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
        # Names of the last layer's parameters; empty for a graph that ends otherwise.
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
        """Return an unused attribute name that resembles the value's name."""
        free = re.sub(r"\W", "_", name)
        while not free or hasattr(self, free):
            free += "_"
        return free

    def forward(self, images: Tensor) -> Tensor:
        """Return the first output for images in the model's input shape."""
        values = {self._image: images, **self._integers}
        values.update({name: getattr(self, attribute) for name, attribute in self._held.items()})
        for node, finished in zip(self._nodes, self._last_uses, strict=True):
            values.update(_run(node, values))
            for name in finished:
                del values[name]  # without gradients, the memory of activations is reused
        return values[self._output]

    def to_onnx(self) -> onnx.ModelProto:
        """Return the original model with the trained weights.

        Unchanged tensors keep their bytes.
        """
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
    """Return inputs with shape arithmetic moved to the features' device."""
    operands = [x for slot, x in enumerate(inputs) if slot not in fixed and x is not None]
    device = next((x.device for x in operands if x.device.type != "cpu"), None)
    if device is None:
        return list(inputs)
    return [x if x is None or slot in fixed else x.to(device) for slot, x in enumerate(inputs)]


def _last_uses(nodes: Sequence[Node], output: str) -> list[tuple[str, ...]]:
    """Return for each node the values that no later node reads."""
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
