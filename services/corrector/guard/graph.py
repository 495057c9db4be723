"""The guard as one ONNX graph.

The graph maps the classifier's input through the encoder to region, risk, and whether the image is inside the region.
It is written around the encoder's own graph at that graph's opset, since any exporter may have made it: every operator
used here has the same meaning from opset 13 on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import onnx
from defuse.guard_outputs import INDEX, INSIDE, REGION, RISK, TYPICALITY
from defuse.v1 import model_pb2
from onnx import TensorProto, compose, helper, numpy_helper, version_converter

from services.arrays import Array
from services.statistics.gaussian import shrunk_covariance

# Least variance of a component, in squared aggregate sds: coplanar latents would have none.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class GaussianMixtures:
    """K Gaussians over points x (n, d).

    They have weights, means, and inverses of the covariances' lower Cholesky factors.
    """

    log_weight: Array  # (k,)
    mean: Array  # (k, d)
    whitening: Array  # (k, d, d)

    @classmethod
    def of(cls, parts: Sequence[Array], weights: Sequence[float]) -> Self:
        """Fit one Gaussian to each of k non-empty sets of points (n, d).

        The covariance of a set is shrunk towards the pooled one, which counts as d
        points: it is the posterior mean under the Wishart prior of the distiller's
        mixture.
        """
        pooled = _pooled(parts)
        covariances = [shrunk_covariance(_scatter(x), len(x), pooled) for x in parts]
        return cls(
            log_weight=np.log(np.asarray(weights) / np.sum(weights)),
            mean=np.stack([x.mean(axis=0, dtype=np.float64) for x in parts]),
            whitening=np.stack([np.linalg.inv(np.linalg.cholesky(covariance)) for covariance in covariances]),
        )

    @property
    def log_scale(self) -> Array:
        """Return the log of weight times density at the mean, (k,).

        The factor `(2 pi)^(-d/2)` is left out.
        """
        return np.asarray(self.log_weight + np.log(np.diagonal(self.whitening, axis1=1, axis2=2)).sum(axis=1))


def _pooled(parts: Sequence[Array]) -> Array:
    """Return the covariance (d, d) within sets of points."""
    centred = np.concatenate([x - x.mean(axis=0, dtype=np.float64) for x in parts])
    return np.asarray(centred.T @ centred / len(centred)) + _LEAST_VARIANCE * np.eye(centred.shape[1])


def _scatter(x: Array) -> Array:
    """Return the sum of squares (d, d) of points x (n, d) around their mean."""
    centred = x - x.mean(axis=0, dtype=np.float64)
    return np.asarray(centred.T @ centred)


# ONNX types of the outputs, in order.
_TYPES = {
    REGION: TensorProto.STRING,
    INDEX: TensorProto.INT64,
    RISK: TensorProto.FLOAT,
    INSIDE: TensorProto.BOOL,
    TYPICALITY: TensorProto.FLOAT,
}
_LEAST_OPSET, _OPSET = 13, 17
_ENCODER = "encoder_"


@dataclass(frozen=True, kw_only=True)
class GuardMixtures:
    """The latent mixtures and the typicality table of a guard.

    Latents are in units of `scale`.
    """

    # Names of the k regions, in the order of the mixture's components.
    names: Sequence[str]
    regions: GaussianMixtures
    real: GaussianMixtures
    # (d,): divisor of posterior means.
    scale: Array
    # Log densities of real images under `aggregate`, ascending, (q,): the typicality table.
    aggregate: GaussianMixtures
    log_density: Array


def guard_graph(encoder: bytes, model: model_pb2.Model, known: GuardMixtures, *, threshold: float) -> bytes:
    """Return the ONNX file of a guard.

    `threshold` is the least risk that counts as inside. The input is the classifier's, preprocessed as it declares, (n,
    ...). The outputs are (n, 1) each: name of the region, empty outside all regions; index of the likeliest region,
    inside or not; risk, the log likelihood ratio of the region against real images; whether the risk reaches the
    threshold; typicality, the share of real images that are less typical. Raises ValueError for an encoder that is not
    an ONNX graph of one input.
    """
    body = _encoder(encoder)
    write = _Writer()
    image = _pixels(write, model)
    [entry] = [value for value in body.graph.input if value.name not in {one.name for one in body.graph.initializer}]
    write.add("Identity", image, name=entry.name)
    after = _Writer(prefix="guard_")
    _head(after, body.graph.output[0].name, known, threshold)
    graph = helper.make_graph(
        [*write.nodes, *body.graph.node, *after.nodes],
        "guard",
        [_image_value(model)],
        [helper.make_tensor_value_info(name, kind, [_rows(model), 1]) for name, kind in _TYPES.items()],
        [*body.graph.initializer, *write.constants, *after.constants],
    )
    whole = helper.make_model(
        graph, opset_imports=body.opset_import, functions=body.functions, ir_version=body.ir_version
    )
    onnx.checker.check_model(whole)
    return bytes(whole.SerializeToString())


def _encoder(file: bytes) -> onnx.ModelProto:
    """Return the encoder with unique names, at a supported opset."""
    model = onnx.load_model_from_string(file)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset < _LEAST_OPSET:
        model = version_converter.convert_version(model, _OPSET)
    return compose.add_prefix(model, _ENCODER)


@dataclass(kw_only=True)
class _Writer:
    """Collects nodes and constants of a graph, named by number."""

    prefix: str = "pixels_"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the output's name."""
        output = name or f"{self.prefix}{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"make_{output}", **attributes))
        return output

    def constant(self, value: Array) -> str:
        """Add a tensor and return its name."""
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def axes(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def _rows(model: model_pb2.Model) -> int | str:
    return model.fixed_batch_size or "n"


def _image_value(model: model_pb2.Model) -> onnx.ValueInfoProto:
    height, width, channels = model.image_shape
    image = [channels, height, width] if _channels_first(model) else [height, width, channels]
    kind = {"FP32": TensorProto.FLOAT, "UINT8": TensorProto.UINT8}[model.input_datatype]
    return helper.make_tensor_value_info(model.input_name, kind, [_rows(model), *image])


def _channels_first(model: model_pb2.Model) -> bool:
    return model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NCHW


def _pixels(write: _Writer, model: model_pb2.Model) -> str:
    """Write the inverse of the preprocessing, and return its output's name.

    It maps the classifier's input to images (n, c, h, w) in [0, 1].
    """
    declared = model.preprocessing
    pixels = write.add("Cast", model.input_name, to=TensorProto.FLOAT)
    if not _channels_first(model):
        pixels = write.add("Transpose", pixels, perm=[0, 3, 1, 2])
    if declared.std:
        pixels = write.add("Mul", pixels, write.constant(_per_channel(declared.std)))
        pixels = write.add("Add", pixels, write.constant(_per_channel(declared.mean)))
    pixels = write.add("Sub", pixels, write.number(declared.low))
    pixels = write.add("Div", pixels, write.number(declared.high - declared.low))
    return write.add("Clip", pixels, write.number(0), write.number(1))


def _per_channel(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def _head(write: _Writer, mu: str, known: GuardMixtures, threshold: float) -> None:
    """Write the part behind the encoder, from posterior means (n, d) to outputs."""
    # Relative to a point amid the real images: far from the origin, float32 cannot resolve distances.
    centre = np.exp(known.real.log_weight) @ known.real.mean
    x = write.add("Div", mu, write.constant(known.scale.astype(np.float32)))
    x = write.add("Sub", x, write.constant(centre.astype(np.float32)))  # (n, d)
    regions, likeliest = _log_density(write, x, known.regions, centre)
    real, _ = _log_density(write, x, known.real, centre)
    write.add("Sub", regions, real, name=RISK)
    write.add("GreaterOrEqual", RISK, write.number(threshold), name=INSIDE)
    write.add("Identity", likeliest, name=INDEX)
    names = write.constant(np.array([*known.names, ""], object))
    outside = write.constant(np.array(len(known.names), np.int64))
    write.add("Gather", names, write.add("Where", INSIDE, INDEX, outside), name=REGION, axis=0)
    usual, _ = _log_density(write, x, known.aggregate, centre)
    table = write.constant(known.log_density.astype(np.float32)[None])  # (1, q)
    below = write.add("Cast", write.add("Less", table, usual), to=TensorProto.FLOAT)  # (n, q)
    count = write.add("ReduceSum", below, write.axes(1), keepdims=1)
    write.add("Div", count, write.number(len(known.log_density)), name=TYPICALITY)


def _log_density(write: _Writer, x: str, mixture: GaussianMixtures, centre: Array) -> tuple[str, str]:
    """Write the log density (n, 1) of points, and the likeliest component (n, 1).

    Points x (n, d) are relative to a centre, and the factor `(2 pi)^(-d/2)` is left out. Returns the names of both
    outputs.
    """
    components, dim = mixture.mean.shape
    towards = mixture.whitening.transpose(2, 0, 1).reshape(dim, components * dim)
    at_mean = np.einsum("kij,kj->ki", mixture.whitening, mixture.mean - centre).reshape(-1)
    whitened = write.add("MatMul", x, write.constant(towards.astype(np.float32)))
    whitened = write.add("Sub", whitened, write.constant(at_mean.astype(np.float32)))  # (n, k * d)
    squares = write.add("Reshape", write.add("Mul", whitened, whitened), write.axes(-1, components, dim))
    distance = write.add("ReduceSum", squares, write.axes(2), keepdims=0)  # (n, k)
    log_scale = write.constant(mixture.log_scale.astype(np.float32)[None])
    terms = write.add("Sub", log_scale, write.add("Mul", distance, write.number(0.5)))
    largest, position = f"{terms}_largest", f"{terms}_position"
    write.nodes.append(
        helper.make_node("TopK", [terms, write.axes(1)], [largest, position], name=f"make_{largest}", axis=1)
    )
    shares = write.add("Exp", write.add("Sub", terms, largest))
    total = write.add("Log", write.add("ReduceSum", shares, write.axes(1), keepdims=1))
    return write.add("Add", largest, total), position
