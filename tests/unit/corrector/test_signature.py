from collections.abc import Callable
from typing import Any

import onnx
import pytest
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2

from services.corrector.signature import read_signature

Build = Callable[..., bytes]
Declare = Callable[..., model_pb2.Model]


def refused(model: model_pb2.Model, file: bytes, *, reason: str) -> str:
    """Return the sentence with which a file is refused, for the right reason."""
    with pytest.raises(InvalidInput) as caught:
        read_signature(model, file)
    assert caught.value.reason == reason
    return caught.value.message


def test_signature_is_read_from_the_file(onnx_classifier: Build, declared: Declare) -> None:
    """Names, shape, data type and batch come from the file; the declaration stays, logits unless said otherwise."""
    given = declared()
    model = read_signature(given, onnx_classifier(shape=("batch", 3, 8, 10)))
    assert list(model.image_shape) == [8, 10, 3]
    assert (model.input_name, model.output_name, model.input_datatype) == ("image", "logits", "FP32")
    assert (model.fixed_batch_size, model.max_batch_size > 0) == (0, True)
    assert model.output == model_pb2.Model.OUTPUT_LOGITS
    assert (list(model.classes), model.preprocessing) == (["ant", "bee", "cat"], given.preprocessing)
    assert not given.image_shape


def test_other_layout_and_data_type(onnx_classifier: Build, declared: Declare) -> None:
    """Height, width and channels are found in NHWC too, and bytes are taken as they are."""
    file = onnx_classifier(shape=("batch", 8, 10, 3), datatype=onnx.TensorProto.UINT8)
    model = read_signature(declared(layout="NHWC", high=255.0), file)
    assert (list(model.image_shape), model.input_datatype) == ([8, 10, 3], "UINT8")


def test_fixed_batch_size(onnx_classifier: Build, declared: Declare) -> None:
    """A batch size that the graph fixes is kept, and Triton is given no batching of its own."""
    model = read_signature(declared(), onnx_classifier(shape=(4, 1, 8, 8)))
    assert (model.fixed_batch_size, model.max_batch_size) == (4, 0)


def test_declared_probabilities_stay(onnx_classifier: Build, declared: Declare) -> None:
    """The owner's declaration of the output is kept."""
    model = declared()
    model.output = model_pb2.Model.OUTPUT_PROBABILITIES
    assert read_signature(model, onnx_classifier()).output == model_pb2.Model.OUTPUT_PROBABILITIES


@pytest.mark.parametrize("file", [b"", b"not a model", b"\x08\x07"])
def test_not_onnx(file: bytes, declared: Declare) -> None:
    """Bytes that are no ONNX model are refused with their size."""
    assert f"{len(file)} bytes" in refused(declared(), file, reason="NOT_ONNX")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (("batch", 64), "2 dimensions"),
        (("batch", 8, 8, 1), "8 channels"),
        (("batch", 2, 8, 8), "2 channels"),
        (("batch", 1, 8, 8, 1), "5 dimensions"),
    ],
)
def test_wrong_shape(shape: tuple[Any, ...], words: str, onnx_classifier: Build, declared: Declare) -> None:
    """An input that is no image of the declared layout is refused with what it has."""
    message = refused(declared(), onnx_classifier(shape=shape), reason="BAD_INPUT")
    assert words in message
    assert "NCHW" in message


def test_several_inputs(onnx_classifier: Build, declared: Declare) -> None:
    """A graph with two inputs is refused by their names."""
    assert "(image, mask)" in refused(declared(), onnx_classifier(inputs=("image", "mask")), reason="BAD_INPUT")


def test_data_type_that_is_no_image(onnx_classifier: Build, declared: Declare) -> None:
    """Only floats and bytes are images."""
    file = onnx_classifier(datatype=onnx.TensorProto.INT64)
    assert "INT64" in refused(declared(), file, reason="BAD_INPUT")


def test_class_count_mismatch(onnx_classifier: Build, declared: Declare) -> None:
    """A model with another number of outputs than declared classes is refused with both numbers."""
    message = refused(declared(classes=("ant", "bee")), onnx_classifier(classes=5), reason="CLASS_COUNT_MISMATCH")
    assert "2 declared classes" in message
    assert "5" in message


@pytest.mark.parametrize("classes", [(), ("ant",), ("ant", "bee", "ant")])
def test_classes_are_two_or_more_distinct_names(
    classes: tuple[str, ...], onnx_classifier: Build, declared: Declare
) -> None:
    """Fewer than two classes, or one of them twice, are refused."""
    refused(declared(classes=classes), onnx_classifier(), reason="BAD_CLASSES")


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"mean": [0.5], "std": []},
        {"mean": [], "std": [0.5]},
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5], "std": [-1.0]},
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        {"low": 1.0, "high": 1.0},
        {"low": 0.0, "high": -1.0},
        {"mean": [0.5], "std": [float("nan")]},
        {"high": float("inf")},
    ],
)
def test_bad_preprocessing(preprocessing: dict[str, Any], onnx_classifier: Build, declared: Declare) -> None:
    """An empty range, or mean and std that do not fit each other or the channels, are refused."""
    refused(declared(**preprocessing), onnx_classifier(), reason="BAD_PREPROCESSING")


def test_layout_must_be_declared(onnx_classifier: Build, declared: Declare) -> None:
    """Without a layout the shape cannot be read, so it is asked for."""
    assert "NCHW" in refused(declared(layout="UNSPECIFIED"), onnx_classifier(), reason="BAD_PREPROCESSING")
