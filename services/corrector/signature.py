"""The signature of an ONNX file, checked against its owner's declaration."""

import math

import numpy as np
import onnx
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2

from services.onnx_graph.onnx_files import onnx_function

_DATATYPES: dict[int, tuple[str, type]] = {
    onnx.TensorProto.FLOAT: ("FP32", np.float32),
    onnx.TensorProto.UINT8: ("UINT8", np.uint8),
}
# Properties of a file that callers depend on, and their names.
_NOTICED = {
    "input_name": "the input's name",
    "input_datatype": "the input's type",
    "image_shape": "the images' shape",
    "output_name": "the output's name",
    "fixed_batch_size": "the fixed batch size",
}
# Images of one request: enough to keep a GPU busy, few enough for one message.
_MAX_BATCH = 256


def read_signature(declared: model_pb2.Model, file: bytes) -> model_pb2.Model:
    """Return the declared model, completed from the file.

    Raises InvalidInput when declaration and file disagree.
    """
    graph = _parse(file).graph
    model = model_pb2.Model()
    model.CopyFrom(declared)
    _check_declaration(model)
    _read_input(model, graph)
    _read_output(model, graph, file)
    if not model.output:
        model.output = model_pb2.Model.OUTPUT_LOGITS
    return model


def check_same_signature(model: model_pb2.Model, file: bytes) -> None:
    """Raise InvalidInput for inputs or outputs that differ from the model's."""
    found = read_signature(model, file)
    for field, noticed in _NOTICED.items():
        if getattr(found, field) != getattr(model, field):
            raise InvalidInput(
                f"{noticed} of the file is {getattr(found, field)}, callers of {names.last(model.name)!r} expect "
                f"{getattr(model, field)}; export it as the version that is served",
                reason="SIGNATURE_MISMATCH",
            )


def _parse(file: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(file)
        onnx.checker.check_model(model)
    except Exception as error:  # the parser and the checker raise various exceptions, some of them bare
        raise InvalidInput(
            f"the file of {len(file)} bytes is no ONNX model ({str(error).splitlines()[0][:200]}); export it again",
            reason="NOT_ONNX",
        ) from error
    return model


def _check_declaration(model: model_pb2.Model) -> None:
    if len(model.classes) < 2 or len(set(model.classes)) != len(model.classes):
        raise InvalidInput(
            f"classes must be two or more distinct names, not {list(model.classes)}", reason="BAD_CLASSES"
        )
    declared = model.preprocessing
    if not declared.layout:
        raise InvalidInput("the layout is not declared; use NCHW or NHWC", reason="BAD_PREPROCESSING")
    numbers = [declared.low, declared.high, *declared.mean, *declared.std]
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidInput(f"range, mean and std must be finite, not {numbers}", reason="BAD_PREPROCESSING")
    if not declared.low < declared.high:
        raise InvalidInput(
            f"the range {declared.low},{declared.high} is empty; the first value is what pixel 0 becomes, the second "
            "what pixel 255 becomes",
            reason="BAD_PREPROCESSING",
        )
    if len(declared.mean) != len(declared.std) or any(value <= 0 for value in declared.std):
        raise InvalidInput(
            f"mean {list(declared.mean)} and std {list(declared.std)} need one value per channel each, std above 0",
            reason="BAD_PREPROCESSING",
        )


def _read_input(model: model_pb2.Model, graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs)
        raise InvalidInput(
            f"the graph has {len(inputs)} inputs ({names}); it must have one, the image", reason="BAD_INPUT"
        )
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in _DATATYPES:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise InvalidInput(f"input {inputs[0].name!r} is {name}; it must be FLOAT or UINT8", reason="BAD_INPUT")
    model.input_name = inputs[0].name
    model.input_datatype = _DATATYPES[tensor.elem_type][0]
    _read_input_shape(model, [dim.dim_value for dim in tensor.shape.dim])


def _read_input_shape(model: model_pb2.Model, dims: list[int]) -> None:
    """Set image shape and batch size from the input's dimensions (batch, ...).

    A dimension of 0 is an unknown size.
    """
    channels_first = model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NCHW
    layout = "NCHW" if channels_first else "NHWC"
    if len(dims) != 4:
        raise InvalidInput(
            f"input {model.input_name!r} has {len(dims)} dimensions; images of layout {layout} have four",
            reason="BAD_INPUT",
        )
    height, width, channels = (dims[2], dims[3], dims[1]) if channels_first else (dims[1], dims[2], dims[3])
    if channels not in {1, 3} or not height or not width:
        raise InvalidInput(
            f"input {model.input_name!r} has shape {dims}; with layout {layout} that is {height}x{width} pixels and "
            f"{channels} channels, where fixed sizes and 1 or 3 channels are needed; is the layout right?",
            reason="BAD_INPUT",
        )
    declared = len(model.preprocessing.mean)
    if declared not in {0, channels}:
        raise InvalidInput(
            f"mean and std have {declared} values, the input has {channels} channels", reason="BAD_PREPROCESSING"
        )
    model.image_shape[:] = [height, width, channels]
    model.fixed_batch_size = dims[0]
    model.max_batch_size = 0 if dims[0] else _MAX_BATCH


def _read_output(model: model_pb2.Model, graph: onnx.GraphProto, file: bytes) -> None:
    """Set the output's name, after a run has confirmed its shape.

    Actual outputs are more reliable than declared ones.
    """
    batch = model.fixed_batch_size or 2
    height, width, channels = model.image_shape
    channels_first = model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NCHW
    shape = (batch, channels, height, width) if channels_first else (batch, height, width, channels)
    dtype = np.uint8 if model.input_datatype == "UINT8" else np.float32
    try:
        output = onnx_function(file)(np.zeros(shape, dtype))[0]
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise InvalidInput(f"ONNX Runtime cannot run the file: {error}", reason="NOT_RUNNABLE") from error
    if output.shape != (batch, len(model.classes)):
        raise InvalidInput(
            f"for {batch} images the model answers {output.shape}, where ({batch}, {len(model.classes)}) is expected "
            f"for the {len(model.classes)} declared classes; declare the classes that it has",
            reason="CLASS_COUNT_MISMATCH",
        )
    model.output_name = graph.output[0].name
