"""What many unit tests build on: a store in a temporary folder, tiny ONNX classifiers, a Triton that only remembers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from defuse.errors import NotReady
from defuse.v1 import model_pb2
from onnx import helper, numpy_helper

from services.runtime.artifacts import ArtifactStore


class RememberingTriton:
    """Stands where the inference client stands for the repository: loads and unloads are remembered, or refused."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.refuses = False

    def load(self, model_id: str) -> None:
        if self.refuses:
            raise NotReady(f"{model_id} was refused")
        self.calls.append(("load", model_id))

    def unload(self, model_id: str) -> None:
        self.calls.append(("unload", model_id))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path}/store")


@pytest.fixture
def triton() -> RememberingTriton:
    return RememberingTriton()


@pytest.fixture
def onnx_classifier() -> Callable[..., bytes]:
    return build_onnx_classifier


@pytest.fixture
def declared() -> Callable[..., model_pb2.Model]:
    return declare


def build_onnx_classifier(
    shape: Sequence[int | str] = ("batch", 1, 8, 8),
    classes: int = 3,
    datatype: int = onnx.TensorProto.FLOAT,
    inputs: Sequence[str] = ("image",),
    seed: int = 0,
) -> bytes:
    """Return cast, sum of the inputs, flatten and one matrix product as an ONNX file; `seed` draws the matrix."""
    features = int(np.prod(shape[1:]))
    weight = np.random.default_rng(seed).standard_normal((features, classes)).astype(np.float32)
    nodes = [helper.make_node("Cast", [name], [f"{name}_float"], to=onnx.TensorProto.FLOAT) for name in inputs]
    nodes += [
        helper.make_node("Sum", [f"{name}_float" for name in inputs], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, datatype, list(shape)) for name in inputs],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [shape[0], classes])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def declare(
    name: str = "models/tiny",
    classes: Sequence[str] = ("ant", "bee", "cat"),
    layout: str = "NCHW",
    **preprocessing: Any,
) -> model_pb2.Model:
    """Return what a user declares of a classifier."""
    return model_pb2.Model(
        name=name,
        classes=classes,
        preprocessing=model_pb2.Preprocessing(
            **{"layout": f"LAYOUT_{layout}", "low": 0.0, "high": 1.0, **preprocessing}
        ),
    )
