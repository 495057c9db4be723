"""Fixtures of unit tests: a temporary store, tiny ONNX classifiers, a recording stand-in for Triton."""

from collections.abc import Callable
from pathlib import Path

import pytest
from defuse.errors import NotReady
from defuse.v1 import model_pb2
from hypothesis import settings

from services.storage.artifacts import ArtifactStore
from services.triton.client import InferenceClient
from tests.onnx_files import build_onnx_classifier, declare

# An example may take as long as a busy machine needs.
settings.register_profile("defuse", deadline=None)
settings.load_profile("defuse")


class RememberingTriton(InferenceClient):
    """A client of no server: loads and unloads are remembered, or refused."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")
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
