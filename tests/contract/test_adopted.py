"""A Triton that somebody else runs: taken on as it is, never written, versions handed over and noticed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import correction_pb2, gate_pb2, model_pb2, release_pb2

from services.corrector.external_triton import OPERATOR, ExternalTritonReleases
from services.corrector.release_history import ChangeAuthor
from services.corrector.signature import read_signature
from services.corrector.triton_repository import TritonRepository
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.triton.client import InferenceClient
from tests.onnx_files import build_onnx_classifier, declare

NAME = "models/theirs"
Kind = release_pb2.Release


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """The state of an external Triton, and our records of it."""

    operator: TritonRepository
    store: ArtifactStore
    handover: Path
    releases: ExternalTritonReleases

    def serve(self, *versions: int) -> None:
        self.operator.serve(read_signature(declare(NAME), build_onnx_classifier()), "theirs", versions)

    def upload(self, seed: int = 0) -> str:
        digest = f"{seed}" * 64
        self.store.write_bytes(keys.file(digest), build_onnx_classifier(seed=seed))
        return digest

    def history(self) -> list[tuple[int, int, int, str]]:
        return [(one.kind, one.version, one.previous_version, one.actor) for one in Catalog(self.store).releases(NAME)]


@pytest.fixture
def theirs(tmp_path: Path, inference: InferenceClient, repository: TritonRepository) -> Iterator[Theirs]:
    """Their version 4 of a model, with a store and a directory for handing over."""
    store = ArtifactStore(f"file://{tmp_path}/store")
    releases = ExternalTritonReleases(store, inference, tmp_path / "handover")
    found = Theirs(operator=repository, store=store, handover=tmp_path / "handover", releases=releases)
    repository.add_version("theirs", 4, build_onnx_classifier())
    found.serve(4)
    yield found
    repository.withdraw("theirs")


def corrected(theirs: Theirs) -> tuple[correction_pb2.Correction, ChangeAuthor]:
    """Leave a correction of version 4 that passed the gate."""
    name = "runs/first/corrections/c1"
    theirs.store.write_bytes(keys.corrected_file(name), build_onnx_classifier(seed=1))
    verdict = gate_pb2.GateVerdict(name=f"{NAME}/verdicts/v1", passed=True)
    theirs.store.write_message(keys.verdict(verdict.name), verdict)
    correction = correction_pb2.Correction(name=name, model=NAME, base_version=4)
    return correction, ChangeAuthor(actor="anna", reason="bold sevens", verdict=verdict.name)


def test_a_model_is_taken_on_at_the_version_that_is_served(theirs: Theirs) -> None:
    """The file must answer as Triton does; nothing of theirs is written."""
    with pytest.raises(InvalidInput, match="the very file"):
        theirs.releases.register(declare(NAME), theirs.upload(seed=1))
    with pytest.raises(NotReady, match="unknown"):
        theirs.releases.register(declare("models/unknown"), theirs.upload())
    model = theirs.releases.register(declare(NAME), theirs.upload())
    assert model.champion_version == 4
    assert not theirs.handover.exists()


def test_a_release_is_handed_over_and_noticed(theirs: Theirs) -> None:
    """A version directory with its verdict beside it; callers get it when its operator serves it, and back."""
    theirs.releases.register(declare(NAME), theirs.upload())
    released = theirs.releases.publish(*corrected(theirs))
    assert (released.kind, released.version, released.previous_version) == (Kind.KIND_HANDED_OVER, 5, 4)
    assert (theirs.handover / "theirs/5/model.onnx").read_bytes() == build_onnx_classifier(seed=1)
    assert json.loads((theirs.handover / "theirs/5.verdict.json").read_text())["passed"]
    assert Catalog(theirs.store).model(NAME).champion_version == 4
    theirs.releases.notice(NAME)
    assert len(theirs.history()) == 2

    theirs.operator.add_version("theirs", 5, (theirs.handover / "theirs/5/model.onnx").read_bytes())
    theirs.serve(4, 5)
    theirs.releases.notice(NAME)
    theirs.releases.notice(NAME)
    theirs.serve(4)
    theirs.releases.notice(NAME)
    assert theirs.history() == [
        (Kind.KIND_REGISTERED, 4, 0, ""),
        (Kind.KIND_HANDED_OVER, 5, 4, "anna"),
        (Kind.KIND_RELEASED, 5, 4, OPERATOR),
        (Kind.KIND_ROLLED_BACK, 4, 5, OPERATOR),
    ]


def test_what_is_not_ours_is_not_changed(theirs: Theirs) -> None:
    """The way back is the operator's; a candidate runs here."""
    model: model_pb2.Model = theirs.releases.register(declare(NAME), theirs.upload())
    with pytest.raises(NotReady, match="not ours to change"):
        theirs.releases.restore_previous(NAME, ChangeAuthor())
    candidate = theirs.releases.serve_candidate(model, build_onnx_classifier(seed=1))
    assert candidate.name == ""
    with theirs.releases.serving(model, build_onnx_classifier(seed=1)) as version:
        assert version.model == model
    assert theirs.operator.versions("theirs") == [4]


def test_a_version_of_theirs_that_is_not_known_is_left_alone(theirs: Theirs) -> None:
    """It was not handed over: no correction starts from a file that is not here."""
    theirs.releases.register(declare(NAME), theirs.upload())
    theirs.operator.add_version("theirs", 9, build_onnx_classifier(seed=2))
    theirs.serve(4, 9)
    theirs.releases.notice(NAME)
    assert len(theirs.history()) == 1
