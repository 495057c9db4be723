"""The promises of a classifier, on the real Triton: every answer equals ONNX Runtime's for the same file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from defuse.errors import NotReady
from defuse.v1 import model_pb2

from services.arrays import as_floats
from services.corrector.signature import read_signature
from services.corrector.triton_repository import TritonRepository
from services.triton.client import Classifier, InferenceClient
from tests.onnx_files import build_onnx_classifier, declare

Array = npt.NDArray[Any]
MEAN, STD = (0.1, -0.2, 0.4), (0.5, 0.25, 2.0)
# More than one request holds of a classifier that takes any batch size.
MANY = 300


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of classifier, and its input for stored images (n, h, w, c) written out by hand."""

    file: Mapping[str, Any]
    declaration: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Array], Array]
    counts: tuple[int, ...] = (1, 10, MANY)


def plain(stored: Array) -> Array:
    return (stored / 255).transpose(0, 3, 1, 2).astype(np.float32)


def normalised(stored: Array) -> Array:
    """Pixel 0 becomes -1, pixel 255 becomes 3; then mean and standard deviation of each channel."""
    scaled = stored / 255 * 4 - 1
    channels = [(scaled[..., c] - MEAN[c]) / STD[c] for c in range(3)]
    return np.stack(channels, axis=1).astype(np.float32)  # (n, c, h, w)


CHANNELS_FIRST, CHANNELS_LAST = ("batch", 3, 8, 10), ("batch", 8, 10, 3)
KINDS = {
    "nchw": Kind(file={"shape": CHANNELS_FIRST}, prepare=plain),
    "nhwc": Kind(
        file={"shape": CHANNELS_LAST},
        declaration={"layout": "NHWC"},
        prepare=lambda stored: (stored / 255).astype(np.float32),
    ),
    "bytes": Kind(
        file={"shape": CHANNELS_LAST, "datatype": onnx.TensorProto.UINT8},
        declaration={"layout": "NHWC", "high": 255.0},
        prepare=lambda stored: stored,
    ),
    "probabilities": Kind(
        file={"shape": CHANNELS_FIRST, "probabilities": True}, declaration={"output": "PROBABILITIES"}, prepare=plain
    ),
    "fixed": Kind(file={"shape": (4, 3, 8, 10)}, prepare=plain, counts=(1, 4, 10)),
    "normalised": Kind(
        file={"shape": CHANNELS_FIRST},
        declaration={"low": -1.0, "high": 3.0, "mean": MEAN, "std": STD},
        prepare=normalised,
    ),
}


def random_stored(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 10, 3), dtype=np.uint8)


def local_logits(file: bytes, inputs: Array, model: model_pb2.Model) -> Array:
    """Run the file here; a graph with a batch size of its own gets the images in parts, the last one filled up."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    size = model.fixed_batch_size or len(inputs)
    padded = np.concatenate([inputs, np.zeros((-len(inputs) % size, *inputs.shape[1:]), inputs.dtype)])
    parts = [session.run(None, {"image": part})[0] for part in np.split(padded, len(padded) // size)]
    outputs = np.concatenate(parts)[: len(inputs)]
    return np.log(np.maximum(outputs, 1e-12)) if model.output == model_pb2.Model.OUTPUT_PROBABILITIES else outputs


def serve(repository: TritonRepository, name: str, file: bytes, **declaration: Any) -> model_pb2.Model:
    """Put a file on Triton as version 1, as the corrector does."""
    model = read_signature(declare(f"models/{name}", **declaration), file)
    repository.add_version(name, 1, file)
    repository.serve(model, name, [1])
    return model


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_file(name: str, repository: TritonRepository, inference: InferenceClient) -> None:
    """For any layout, type, output, batch size and normalisation, each image gets the logits of the file."""
    kind = KINDS[name]
    file = build_onnx_classifier(**kind.file)
    model = serve(repository, name, file, **kind.declaration)
    classifier = inference.classifier(model, version=1)
    for count in kind.counts:
        stored = random_stored(count)
        expected = local_logits(file, kind.prepare(stored), model)
        assert expected.shape == (count, 3)
        for logits in (classifier.classify_stored(stored), classifier.classify(as_floats(stored))):
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_requests_that_triton_batches(repository: TritonRepository, inference: InferenceClient) -> None:
    """Requests on their way at once, which Triton may run as one batch, are answered each with its own logits."""
    file = build_onnx_classifier(shape=CHANNELS_FIRST)
    model = serve(repository, "batched", file)
    classifier = inference.classifier(model, version=1)
    parts = [random_stored(1 + number % 5, seed=number) for number in range(60)]
    pending = [classifier.submit(as_floats(stored)) for stored in parts]
    for stored, answer in zip(parts, pending, strict=True):
        np.testing.assert_allclose(answer.result(), local_logits(file, plain(stored), model), rtol=1e-4, atol=1e-4)


def test_a_version_is_asked_by_its_number(repository: TritonRepository, inference: InferenceClient) -> None:
    """Two versions are served side by side; a request for one gets it, or an error when it is not loaded."""
    files = {version: build_onnx_classifier(shape=CHANNELS_FIRST, seed=version) for version in (1, 2)}
    model = serve(repository, "versions", files[1])
    repository.add_version("versions", 2, files[2])
    stored = random_stored(5)
    assert_not_served(inference.classifier(model, version=2))
    repository.serve(model, "versions", [1, 2])
    for version, file in files.items():
        logits = inference.classifier(model, version=version).classify_stored(stored)
        np.testing.assert_allclose(logits, local_logits(file, plain(stored), model), rtol=1e-4, atol=1e-4)
    repository.serve(model, "versions", [2])
    assert_not_served(inference.classifier(model, version=1))


def test_a_file_that_cannot_be_opened(repository: TritonRepository, inference: InferenceClient) -> None:
    """Loading what is no ONNX file fails, in Triton's words, and leaves the server as it was."""
    model = read_signature(declare("models/broken"), build_onnx_classifier())
    repository.add_version("broken", 1, b"no model")
    with pytest.raises(NotReady, match="cannot load broken") as caught:
        repository.serve(model, "broken", [1])
    assert caught.value.reason == "MODEL_NOT_READY"
    assert "INVALID_PROTOBUF" in caught.value.message
    repository.remove("broken")
    inference.check()


def test_a_model_that_was_withdrawn(repository: TritonRepository, inference: InferenceClient) -> None:
    """A withdrawn model answers no more, with an error that says so."""
    model = serve(repository, "gone", build_onnx_classifier(shape=CHANNELS_FIRST))
    classifier = inference.classifier(model, version=1)
    assert classifier.classify_stored(random_stored(1)).shape == (1, 3)
    repository.withdraw("gone")
    assert_not_served(classifier)


def assert_not_served(classifier: Classifier) -> None:
    """The refusal is about this model: it is no sign that Triton is away, which callers would wait for."""
    with pytest.raises(NotReady, match="does not serve this model") as caught:
        classifier.classify_stored(random_stored(1))
    assert caught.value.reason == "MODEL_NOT_SERVED"
