import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from defuse.errors import Unavailable
from defuse.v1 import model_pb2

from services.arrays import as_floats, as_stored
from services.localstack.child_process import free_port
from services.triton.client import Classifier, InferenceClient
from services.triton.preprocessing import preprocess, undo_preprocessing
from services.triton.transport import AUTO, GRPC, SYSTEM_SHARED_MEMORY, Request, TransportSetting

Array = npt.NDArray[Any]


def model(layout: str = "NCHW", datatype: str = "FP32", **more: Any) -> model_pb2.Model:
    declared = {"layout": f"LAYOUT_{layout}", "low": 0.0, "high": 1.0} | more.pop("preprocessing", {})
    fields = {
        "name": "models/tiny",
        "input_name": "image",
        "output_name": "logits",
        "max_batch_size": 4,
        "classes": ["a", "b"],
    } | more
    return model_pb2.Model(
        preprocessing=model_pb2.Preprocessing(**declared), input_datatype=datatype, image_shape=[2, 3, 1], **fields
    )


def random_images(count: int, channels: int = 3) -> Array:
    return np.random.default_rng(0).random((count, channels, 4, 5), np.float32)


def test_stored_images_as_floats() -> None:
    """Bytes (n, h, w, c) become floats (n, c, h, w) in [0, 1]."""
    stored = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    floats = as_floats(stored)
    assert (floats.shape, floats.dtype) == ((1, 3, 1, 1), np.float32)
    np.testing.assert_allclose(floats.ravel(), [0, 0.2, 1])


def test_floats_as_stored_images() -> None:
    """Floats are clipped and rounded to the nearest byte."""
    images = np.array([-0.3, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.7], np.float32).reshape(1, 1, 2, 3)
    stored = as_stored(images)
    assert (stored.shape, stored.dtype) == ((1, 2, 3, 1), np.uint8)
    np.testing.assert_array_equal(stored.ravel(), [0, 0, 0, 1, 255, 255])


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    """No stored value is changed by the way there and back, in any channel."""
    stored = np.random.default_rng(0).permutation(np.arange(256, dtype=np.uint8).repeat(3)).reshape(4, 8, 8, 3)
    np.testing.assert_array_equal(as_stored(as_floats(stored)), stored)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "preprocessing",
    [{}, {"low": -1.0}, {"high": 255.0}, {"mean": [0.1, 0.5, 0.9], "std": [0.3, 0.01, 2.0], "low": -1.0, "high": 2.0}],
)
def test_every_byte_survives_the_way_to_the_input_and_back(layout: str, preprocessing: dict[str, Any]) -> None:
    """For any declaration of the model."""
    stored = np.random.default_rng(0).permutation(np.arange(256, dtype=np.uint8).repeat(3)).reshape(4, 8, 8, 3)
    declared = model(layout, preprocessing=preprocessing)
    np.testing.assert_array_equal(undo_preprocessing(preprocess(as_floats(stored), declared), declared), stored)


def test_input_of_plain_floats() -> None:
    """With a range of 0 to 1 and no normalisation NCHW input is the image itself."""
    images = random_images(2)
    ready = preprocess(images, model())
    np.testing.assert_array_equal(ready, images)
    assert (ready.dtype, ready.flags.c_contiguous) == (np.float32, True)


def test_range_then_mean_and_std_per_channel() -> None:
    """The input is (low + pixel * (high - low) - mean) / std, channel by channel."""
    mean, std = [0.5, 0.1, -0.2], [2.0, 0.5, 0.25]
    declared = model(preprocessing={"low": -1.0, "high": 1.0, "mean": mean, "std": std})
    images = random_images(2)
    expected = [(-1 + 2 * images[:, c] - mean[c]) / std[c] for c in range(3)]
    np.testing.assert_allclose(preprocess(images, declared), np.stack(expected, axis=1), rtol=1e-4, atol=1e-6)


def test_channels_last() -> None:
    """NHWC input has its channels last, normalised by channel all the same."""
    declared = model("NHWC", preprocessing={"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]})
    images = random_images(2)
    ready = preprocess(images, declared)
    assert (ready.shape, ready.flags.c_contiguous) == ((2, 4, 5, 3), True)
    np.testing.assert_allclose(ready[..., 2], (images[:, 2] - 0.3) / 4, rtol=1e-5)


def test_input_of_bytes() -> None:
    """UINT8 input of range 0 to 255 is what is stored, rounded rather than cut off."""
    declared = model("NHWC", "UINT8", preprocessing={"high": 255.0})
    stored = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    ready = preprocess(as_floats(stored), declared)
    assert ready.dtype == np.uint8
    np.testing.assert_array_equal(ready, stored)
    np.testing.assert_array_equal(preprocess(np.full((1, 1, 1, 1), 0.999, np.float32), declared), 255)


class Echo:
    """Stands where the connection to Triton stands: answers each image with its number since the start."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.inputs: list[Array] = []

    def infer(self, request: Request, images: Array, write: Callable[[Array, Array], None]) -> "Future[Array]":
        before = sum(one.shape[0] for one in self.requests)
        self.requests.append(request)
        self.inputs.append(np.full(request.shape, np.nan, request.dtype))
        write(images, self.inputs[-1])
        answer: Future[Array] = Future()
        answer.set_result(np.arange(before, before + request.shape[0], dtype=np.float32)[:, None] + [0.0, 0.5])
        return answer


def classifier(echo: Echo, declared: model_pb2.Model) -> Classifier:
    return Classifier(echo, declared, version=3, model_id="tiny-candidate")  # type: ignore[arg-type]


def test_many_images_are_cut_into_requests() -> None:
    """No request is larger than the model's batch, and the answers come back in the order of the images."""
    echo = Echo()
    logits = classifier(echo, model()).classify(random_images(10))
    np.testing.assert_allclose(logits[:, 0], np.arange(10))
    assert echo.requests[0] == Request(
        model_id="tiny-candidate",
        version=3,
        input_name="image",
        datatype="FP32",
        shape=(4, 3, 4, 5),
        output_name="logits",
        output_bytes=4 * 2 * 4,
    )
    assert [request.shape[0] for request in echo.requests] == [4, 4, 2]
    assert logits.dtype == np.float32


def test_fixed_batch_size_is_filled_up() -> None:
    """A fixed batch size gets exactly that many images a request; padding is not returned."""
    echo, images = Echo(), random_images(6)
    logits = classifier(echo, model(fixed_batch_size=4, max_batch_size=0)).classify(images)
    np.testing.assert_array_equal(np.concatenate(echo.inputs), images[[0, 1, 2, 3, 4, 5, 5, 5]])
    np.testing.assert_allclose(logits[:, 0], np.arange(6))


def test_no_images_have_no_logits() -> None:
    """No images are classified without a question, as no rows with a column for each class."""
    echo = Echo()
    asked = classifier(echo, model())
    for logits in (asked.classify(random_images(0)), asked.classify_stored(np.zeros((0, 4, 5, 3), np.uint8))):
        assert (logits.shape, logits.dtype) == ((0, 2), np.float32)
    assert not echo.requests


def test_probabilities_become_logarithms() -> None:
    """Declared probabilities are answered as their logarithm, finite for 0."""
    declared = model(output=model_pb2.Model.OUTPUT_PROBABILITIES)
    logits = classifier(Echo(), declared).classify(random_images(2))
    np.testing.assert_allclose(np.exp(logits), [[0, 0.5], [1, 1.5]], atol=1e-6)
    assert np.isfinite(logits).all()


def test_stored_images_are_classified_in_order() -> None:
    """Stored images are classified in batches and answered in their order."""
    echo = Echo()
    stored = np.zeros((11, 4, 5, 3), np.uint8)
    logits = classifier(echo, model()).classify_stored(stored, batch_size=6)
    np.testing.assert_allclose(logits[:, 0], np.arange(11))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_input_is_written_where_it_is_wanted(layout: str, datatype: str) -> None:
    """Input goes into given memory, an array of numpy or a tensor of torch, and the images stay as they are."""
    mean, std = [0.5, 0.1, -0.2], [2.0, 0.5, 0.25]
    declared = model(layout, datatype, preprocessing={"low": -1.0, "high": 200.0, "mean": mean, "std": std})
    images = random_images(2)
    before, expected = images.copy(), preprocess(images, declared)
    array, tensor = np.empty_like(expected), torch.empty(expected.shape, dtype=torch.from_numpy(expected).dtype)
    assert preprocess(images, declared, out=array) is array
    preprocess(torch.from_numpy(images), declared, out=tensor)
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("transport", [AUTO, GRPC, SYSTEM_SHARED_MEMORY])
def test_triton_that_is_not_there(transport: TransportSetting) -> None:
    """Any call to an absent Triton is Unavailable at once, with its address and its setting."""
    address = f"127.0.0.1:{free_port()}"
    client = InferenceClient(address, timeout_s=60, check_timeout_s=60, in_flight=1, transport=transport)
    begin = time.monotonic()
    for ask in (
        client.check,
        lambda: client.load("tiny"),
        lambda: client.unload("tiny"),
        lambda: client.classifier(model(), version=1).classify(random_images(9)),
        lambda: client.classifier(model(), version=1).classify(random_images(1)),
    ):
        with pytest.raises(Unavailable, match=f"{address}.*DEFUSE_TRITON_URL") as caught:
            ask()
        assert caught.value.reason == "TRITON_UNAVAILABLE"
    assert time.monotonic() - begin < 60  # no call waited for its time to be over
