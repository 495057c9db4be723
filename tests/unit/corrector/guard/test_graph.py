"""The guard's graph against the formulas, on an encoder that is a known matrix."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from defuse.guard_outputs import INDEX, INSIDE, OUTPUTS, REGION, RISK, TYPICALITY
from defuse.v1 import model_pb2
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from services.corrector.guard.graph import GaussianMixtures, GuardMixtures, guard_graph
from services.onnx_graph.onnx_files import onnx_function
from services.triton.preprocessing import preprocess

Array = npt.NDArray[Any]
DIM, SHAPE = 3, (2, 2, 2)  # of latents, and of images as they are stored: height, width, channels
NAMES = ("runs/a/regions/r1", "runs/a/regions/r2")
SCALE = np.array([1.0, 2.0, 0.5])


def matrix() -> Array:
    return np.random.default_rng(0).standard_normal((8, DIM)).astype(np.float32)


def encoder(opset: int = 18) -> bytes:
    """Return images (n, 2, 2, 2) times a matrix, as posterior means, and something beside them."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[n,2,2,2] images) => (float[n,3] mu, float[n,8] flat) '
        "{ flat = Flatten(images) mu = MatMul(flat, weight) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix(), "weight"))
    return bytes(model.SerializeToString())


def declared(**changes: Any) -> model_pb2.Model:
    fields = {"layout": "LAYOUT_NCHW", "low": 0, "high": 1, "mean": [0.3, 0.5], "std": [0.2, 0.4]}
    datatype, fixed = changes.pop("datatype", "FP32"), changes.pop("fixed", 0)
    return model_pb2.Model(
        name="models/m",
        preprocessing=model_pb2.Preprocessing(**{**fields, **changes}),
        input_name="image",
        input_datatype=datatype,
        image_shape=SHAPE,
        fixed_batch_size=fixed,
    )


def points(centre: float, count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, DIM)) * [0.5, 1, 0.7] + centre


def knowledge() -> GuardMixtures:
    real = GaussianMixtures.of([points(0, 400, 1), points(1, 300, 2)], [4, 3])
    return GuardMixtures(
        names=NAMES,
        regions=GaussianMixtures.of([points(2, 50, 3), points(-2, 80, 4)], [50, 80]),
        real=real,
        aggregate=real,
        log_density=np.linspace(-20, 2, 200),
        scale=SCALE,
    )


def log_density(x: Array, mixture: GaussianMixtures) -> Array:
    """Return the log weighted densities (n, k), but for the constant."""
    covariances = [np.linalg.inv(whitening.T @ whitening) for whitening in mixture.whitening]
    columns = [
        weight + multivariate_normal(mean, covariance).logpdf(x) + DIM / 2 * np.log(2 * np.pi)
        for weight, mean, covariance in zip(mixture.log_weight, mixture.mean, covariances, strict=True)
    ]
    return np.stack(columns, axis=1)


def pictures(count: int) -> Array:
    """Return images (n, c, h, w) in [0, 1], in steps of a byte."""
    return np.random.default_rng(5).integers(256, size=(count, 2, 2, 2)).astype(np.float32) / 255


def answers(file: bytes, inputs: Array) -> dict[str, Array]:
    return dict(zip(OUTPUTS, onnx_function(file)(inputs), strict=True))


@pytest.mark.parametrize(
    "model",
    [
        declared(),
        declared(layout="LAYOUT_NHWC"),
        declared(mean=[], std=[], high=255),
        declared(mean=[], std=[], low=-1, high=1),
        declared(mean=[], std=[], high=255, datatype="UINT8", layout="LAYOUT_NHWC"),
        declared(fixed=64),
    ],
    ids=["normalised", "channels-last", "0-to-255", "-1-to-1", "bytes", "fixed-batch"],
)
@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_the_graph_computes_the_formulas(model: model_pb2.Model, opset: int) -> None:
    """For any declared preprocessing and any opset of the encoder: mixtures over its means."""
    known, images = knowledge(), pictures(64)
    x = (images.reshape(64, -1) @ matrix()) / SCALE
    regions, real = (log_density(x, mixture) for mixture in (known.regions, known.real))
    risk = logsumexp(regions, axis=1) - logsumexp(real, axis=1)
    threshold = float(np.median(risk)) + 1e-3
    found = answers(guard_graph(encoder(opset), model, known, threshold=threshold), preprocess(images, model))
    np.testing.assert_allclose(found[RISK][:, 0], risk, rtol=1e-3, atol=2e-3)
    sure = np.abs(risk - threshold) > 1e-2
    np.testing.assert_array_equal(found[INSIDE][sure, 0], (risk >= threshold)[sure])
    np.testing.assert_array_equal(found[INDEX][:, 0], regions.argmax(axis=1))
    names = np.where(found[INSIDE][:, 0], np.array(NAMES)[regions.argmax(axis=1)], "")
    np.testing.assert_array_equal(found[REGION][:, 0], names)
    typicality = np.searchsorted(known.log_density, logsumexp(log_density(x, known.aggregate), axis=1)) / 200
    np.testing.assert_allclose(found[TYPICALITY][:, 0], typicality, atol=1 / 200 + 1e-6)


def test_far_from_everything() -> None:
    """Numbers stay numbers where no Gaussian reaches."""
    known = knowledge()
    found = answers(guard_graph(encoder(), declared(mean=[], std=[]), known, threshold=0), pictures(4) * 0 + 1)
    assert all(np.isfinite(found[name]).all() for name in (RISK, TYPICALITY))


def test_an_encoder_that_is_none() -> None:
    """Anything but an ONNX file is refused."""
    with pytest.raises(Exception, match="pars"):
        guard_graph(b"no graph", declared(), knowledge(), threshold=0)
