"""Candidates made worse on purpose, by surgery on a file: each in one way, some a little, some a lot."""

from collections.abc import Iterator

import numpy as np
import onnx
from defuse.v1 import model_pb2
from onnx import helper, numpy_helper

from benchmarks.stand import Array
from services.corrector.evaluation import LocalVersion
from services.onnx_graph.module import OnnxModule

# Accuracy that a class loses.
CLASS_LOSSES = (0.04, 0.08, 0.15, 0.3)
# What logits are multiplied by: the first two are too sure, the others too unsure.
FACTORS = (2.5, 6.0, 0.4, 0.15)
# Width of the useless layers.
WIDTHS = (1500, 2000, 3000, 4000)


def one_class(file: bytes, model: model_pb2.Model, images: Array, labels: Array) -> Iterator[bytes]:
    """Yield files that read fewer images (n, h, w, c) of one class: its logit is lowered."""
    logits = LocalVersion(file, model).classify_stored(images)
    for label, loss in enumerate(CLASS_LOSSES):
        mine = logits[labels == label]
        lead = mine[:, label] - np.delete(mine, label, axis=1).max(axis=1)
        right = np.sort(lead[lead > 0])
        shift = np.zeros(len(model.classes), np.float32)
        shift[label] = -right[int(loss * len(right))]
        yield _followed(file, "Add", shift)


def calibration(file: bytes) -> Iterator[bytes]:
    """Yield files that answer the same classes, surer or less sure."""
    for factor in FACTORS:
        yield _followed(file, "Mul", np.array(factor, np.float32))


def latency(file: bytes, model: model_pb2.Model) -> Iterator[bytes]:
    """Yield files that answer the same, after more work."""
    pixels = int(np.prod(model.image_shape))
    for width in WIDTHS:
        yield _with_useless_layers(file, pixels, width, len(model.classes))


def broken(file: bytes) -> Iterator[bytes]:
    """Yield broken exports: a weight that is no number, two outputs swapped, a batch that leaks, another input name."""
    not_finite = onnx.load_model_from_string(file)
    name = min(OnnxModule(not_finite).last_layer)
    for tensor in not_finite.graph.initializer:
        if tensor.name.replace(".", "_") == name:
            weight = numpy_helper.to_array(tensor).copy()
            weight.flat[0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    yield bytes(not_finite.SerializeToString())
    classes = onnx.load_model_from_string(file).graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = np.arange(classes)
    order[:2] = [1, 0]
    yield _followed(file, "Gather", order, axis=1)
    yield _leaking(file)
    renamed = onnx.load_model_from_string(file)
    old = renamed.graph.input[0].name
    renamed.graph.input[0].name = "another"
    for node in renamed.graph.node:
        node.input[:] = ["another" if value == old else value for value in node.input]
    yield bytes(renamed.SerializeToString())


def _detached(file: bytes) -> tuple[onnx.ModelProto, str, str]:
    """Return the model with its output under another name, which is free to be computed from it; both names."""
    model = onnx.load_model_from_string(file)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["as_it_was" if value == output else value for value in node.output]
        node.input[:] = ["as_it_was" if value == output else value for value in node.input]
    return model, "as_it_was", output


def _followed(file: bytes, operator: str, constant: Array, **attributes: int) -> bytes:
    model, before, output = _detached(file)
    model.graph.initializer.append(numpy_helper.from_array(constant, "made_worse_by"))
    model.graph.node.append(helper.make_node(operator, [before, "made_worse_by"], [output], **attributes))
    return bytes(model.SerializeToString())


def _leaking(file: bytes) -> bytes:
    """An answer less a tenth of the mean of its batch, as a normalisation does that was exported in training mode."""
    model, before, output = _detached(file)
    for name, value in {"batch": np.array([0]), "tenth": np.array(0.1, np.float32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    axes = {"axes": [0]} if model.opset_import[0].version < 18 else {}
    inputs = [before] if axes else [before, "batch"]
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", inputs, ["batch_mean"], keepdims=1, **axes),
            helper.make_node("Mul", ["batch_mean", "tenth"], ["leak"]),
            helper.make_node("Sub", [before, "leak"], [output]),
        ]
    )
    return bytes(model.SerializeToString())


def _with_useless_layers(file: bytes, pixels: int, width: int, classes: int) -> bytes:
    model, before, output = _detached(file)
    random = np.random.default_rng(0)
    weights = {
        "useless_1": random.standard_normal((pixels, width)) / width,
        "useless_2": random.standard_normal((width, width)) / width,
        "useless_3": np.zeros((width, classes)),
    }
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    nodes, source = [helper.make_node("Flatten", [model.graph.input[0].name], ["flat"])], "flat"
    for name in weights:
        nodes.append(helper.make_node("MatMul", [source, name], [f"after_{name}"]))
        source = f"after_{name}"
    nodes.append(helper.make_node("Add", [before, source], [output]))
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())
