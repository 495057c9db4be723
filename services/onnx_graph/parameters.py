"""Which constants of a graph are weights: what an optimiser may move without changing what the graph means."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum, auto

from torch import Tensor

from services.onnx_graph.graph import Graph, Node
from services.onnx_graph.operators import OPERATORS

_MASKED = -50.0  # exp(-50) is nothing beside 1: an additive mask of attention holds 0 and something lower
_MEASURES = frozenset({"Shape", "Size"})  # whose result does not depend on the content
# The operators of a layer's matrix.
_PRODUCTS = frozenset({"Gemm", "MatMul", "Conv", "Einsum"})
# What may stand between the image and the arithmetic that normalises it.
_PREPROCESSING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Cast", "Clip", "Identity"),
        *("Transpose", "Gather", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Resize", "Pad"),
    }
)


class _Use(Enum):
    FIXED = auto()  # a shape, a bound, a statistic, the image's normalisation
    WEIGHT = auto()
    OPERAND = auto()  # of arithmetic: a weight if it is more than one number


def learnable(graph: Graph) -> frozenset[str]:
    """Names of the constants to train.

    A constant is judged by its consumers: followed through the nodes that compute on constants alone up to where it
    meets the image's features. One fixed use makes it fixed.
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
    """Names of the weights from the last product with features on to the output: its matrix, its bias.

    None where features come together between that product and the output.
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
    """The constants that values are computed from."""
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
    """The ones and zeros with which exporters write a normalisation without an affine map, or GroupNorm as another."""
    normalisations = (node for node in graph.nodes if node.op_type in {"InstanceNormalization", "GroupNormalization"})
    names = {name for node in normalisations for name in node.inputs[1:] if name in graph.constants}
    return {name for name in names if bool((graph.constants[name] == graph.constants[name].reshape(-1)[0]).all())}


def _is_mask(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()
    return bool(low <= _MASKED and ((tensor == low) | (tensor == high)).all())


def _reached(image: str, nodes: Sequence[Node]) -> set[str]:
    """The values that depend on the image's content; its shape alone does not count."""
    reached = {image}
    for node in nodes:
        if node.op_type not in _MEASURES and reached.intersection(node.inputs):
            reached.update(filter(None, node.outputs))
    return reached


def _preprocessed(graph: Graph, features: set[str]) -> set[str]:
    """The features that are still the image: rearranged, resized or normalised, before the first weighted node."""
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
