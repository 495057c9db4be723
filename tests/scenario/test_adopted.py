"""A Triton of another team: its model is taken on, searched and corrected, and its operator is handed the version."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from defuse.v1 import model_pb2

from services.corrector.external_triton import OPERATOR
from services.corrector.signature import read_signature
from services.corrector.triton_repository import TritonRepository
from services.triton.client import InferenceClient
from tests.conftest import Stack, eventually, running_stack
from tests.onnx_files import declare
from tests.planted import CLASSES, TRUE, Planted
from tests.restartable_triton import running_triton
from tests.scenario.conftest import corrected_spot, register

MODEL, RUN = "theirs", "handed-over"
SERVED, NEW = 7, 8


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An external Triton with the planted classifier, and its operator."""

    models: Path
    inference: InferenceClient
    model: model_pb2.Model

    def serve(self, *versions: int) -> None:
        TritonRepository(self.models, self.inference).serve(self.model, MODEL, versions)

    def reads(self, planted: Planted, version: int) -> float:
        """Return the share of the spot's real images that a version reads as what they are."""
        logits = self.inference.classifier(self.model, version=version).classify_stored(planted.spot)
        return float((logits.argmax(axis=1) == TRUE).mean())


@pytest.fixture
def theirs(local_stack: Stack, undisturbed: Any, planted: Planted, tmp_path: Path) -> Iterator[tuple[Stack, Operator]]:
    """A stack that adopts the Triton of an operator, where the classifier is version 7.

    Its store has the VAE of the undisturbed run: data and settings are the same.
    """
    assert undisturbed["state"] == "succeeded"
    shutil.copytree(f"{local_stack.home}/store/vaes", tmp_path / "ours" / "store" / "vaes")
    declared = declare(f"models/{MODEL}", classes=CLASSES, mean=[planted.mean], std=[planted.std])
    file = planted.onnx.read_bytes()
    with running_triton(tmp_path / "theirs") as server, closing(InferenceClient(server.address)) as inference:
        models = tmp_path / "theirs" / "models"
        operator = Operator(models=models, inference=inference, model=read_signature(declared, file))
        TritonRepository(models, inference).add_version(MODEL, SERVED, file)
        operator.serve(SERVED)
        with running_stack(tmp_path / "ours", DEFUSE_TRITON_URL=server.address) as stack:
            yield stack, operator


def test_a_version_is_handed_over_and_put_into_service(theirs: tuple[Stack, Operator], planted: Planted) -> None:
    """The whole loop writes nothing to an external repository; the history records our versions that it serves."""
    stack, operator = theirs
    assert register(stack, planted, MODEL)["champion_version"] == SERVED
    corrected = corrected_spot(stack, planted, MODEL, RUN)
    assert corrected["verdict"]["passed"], corrected["verdict"]
    assert "not ours to write" in stack.defuse("trials", "start", RUN, status=1)

    released = stack.defuse("release", RUN, "--reason", "bold sevens", "--by", "anna")
    assert (released["kind"], released["version"], released["previous_version"]) == ("handed_over", NEW, SERVED)
    assert operator.inference.versions(MODEL) == [SERVED]
    assert [path.name for path in (operator.models / MODEL).iterdir() if path.is_dir()] == [str(SERVED)]
    assert stack.home
    handed_over = stack.home / "handover" / MODEL
    assert json.loads((handed_over / f"{NEW}.verdict.json").read_text())["passed"]

    shutil.copytree(handed_over / str(NEW), operator.models / MODEL / str(NEW))
    operator.serve(SERVED, NEW)
    eventually(lambda: stack.defuse("releases", MODEL)[-1]["kind"] == "released")
    history = stack.defuse("releases", MODEL)
    assert [(one["kind"], one["version"], one["actor"]) for one in history[1:]] == [
        ("handed_over", NEW, "anna"),
        ("released", NEW, OPERATOR),
    ]
    assert operator.reads(planted, SERVED) < 0.5
    assert operator.reads(planted, NEW) > 0.8
    assert "not ours to change" in stack.defuse("rollback", MODEL, status=1)
