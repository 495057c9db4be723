"""Tiny classifiers as ONNX files, and what their owner would declare of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from defuse.v1 import model_pb2
from onnx import helper, numpy_helper


def build_onnx_classifier(
    shape: Sequence[int | str] = ("batch", 1, 8, 8),
    classes: int = 3,
    datatype: int = onnx.TensorProto.FLOAT,
    inputs: Sequence[str] = ("image",),
    seed: int = 0,
    probabilities: bool = False,
) -> bytes:
    """Return cast, sum of the inputs, flatten and one matrix product as an ONNX file; `seed` draws the matrix.

    With `probabilities` a softmax follows.
    """
    output = "probabilities" if probabilities else "logits"
    features = int(np.prod(shape[1:]))
    weight = np.random.default_rng(seed).standard_normal((features, classes)).astype(np.float32)
    nodes = [helper.make_node("Cast", [name], [f"{name}_float"], to=onnx.TensorProto.FLOAT) for name in inputs]
    nodes += [
        helper.make_node("Sum", [f"{name}_float" for name in inputs], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    if probabilities:
        nodes.append(helper.make_node("Softmax", ["logits"], [output]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, datatype, list(shape)) for name in inputs],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [shape[0], classes])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def declare(
    name: str = "models/tiny",
    classes: Sequence[str] = ("ant", "bee", "cat"),
    layout: str = "NCHW",
    output: str = "UNSPECIFIED",
    **preprocessing: Any,
) -> model_pb2.Model:
    """Return what a user declares of a classifier."""
    return model_pb2.Model(
        name=name,
        classes=classes,
        output=f"OUTPUT_{output}",
        preprocessing=model_pb2.Preprocessing(
            **{"layout": f"LAYOUT_{layout}", "low": 0.0, "high": 1.0, **preprocessing}
        ),
    )
