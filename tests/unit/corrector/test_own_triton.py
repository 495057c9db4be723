"""Releases over a store and a repository in a temporary folder; only Triton is not there."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from defuse.errors import AlreadyExists, InvalidInput, NotFound, NotReady
from defuse.v1 import correction_pb2, model_pb2, release_pb2
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from services.corrector.own_triton import Releases
from services.corrector.release_history import NO_AUTHOR, ChangeAuthor
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.onnx_files import build_onnx_classifier, declare
from tests.unit.conftest import RememberingTriton

NAME = "models/tiny"
Kind = release_pb2.Release
WHO = ChangeAuthor(actor="anna", reason="bold sevens")


class House:
    """A model's releases with what they are made on."""

    def __init__(self, store: ArtifactStore, root: Path, triton: RememberingTriton) -> None:
        self.store, self.root, self.triton = store, root, triton
        self.releases = Releases(store, triton, root)

    def upload(self, seed: int = 0, classes: int = 3) -> str:
        file = build_onnx_classifier(seed=seed, classes=classes)
        digest = hashlib.sha256(file).hexdigest()
        self.store.write_bytes(keys.file(digest), file)
        return digest

    def register(self, seed: int = 0) -> model_pb2.Model:
        return self.releases.register(declare(NAME), self.upload(seed))

    def correction(self, number: int, base_version: int) -> correction_pb2.Correction:
        """Leave a corrected file as the corrector would."""
        name = f"runs/first/corrections/c{number}"
        self.store.write_bytes(keys.corrected_file(name), f"file of c{number}".encode())
        return correction_pb2.Correction(name=name, model=NAME, base_version=base_version)

    def champion(self) -> int:
        return int(Catalog(self.store).model(NAME).champion_version)

    def served(self, model_id: str = "tiny") -> list[int]:
        config = (self.root / model_id / "config.pbtxt").read_text()
        return list(text_format.Parse(config, model_config_pb2.ModelConfig()).version_policy.specific.versions)

    def history(self) -> list[tuple["release_pb2.Release.Kind.ValueType", int, int]]:
        return [(one.kind, one.version, one.previous_version) for one in Catalog(self.store).releases(NAME)]


@pytest.fixture
def house(store: ArtifactStore, tmp_path: Path, triton: RememberingTriton) -> House:
    return House(store, tmp_path / "models", triton)


@pytest.fixture
def registered(house: House) -> House:
    house.register()
    return house


def test_a_registered_model_is_served_as_version_1(house: House) -> None:
    """Registration checks the file, serves it as version 1 and records it, with the file's digest."""
    model = house.register()
    assert (model.champion_version, model.input_name) == (1, "image")
    assert house.served() == [1]
    assert house.history() == [(Kind.KIND_REGISTERED, 1, 0)]
    version = house.store.read_message(keys.model_version(NAME, 1), model_pb2.ModelVersion)
    file = (house.root / "tiny/1/model.onnx").read_bytes()
    assert file == house.store.read_bytes(keys.model_file(NAME, 1))
    assert version.digest == hashlib.sha256(file).hexdigest()


def test_a_name_is_registered_once(registered: House) -> None:
    """Another file under the same name is refused, and the first goes on being served."""
    before = (registered.root / "tiny/1/model.onnx").read_bytes()
    with pytest.raises(AlreadyExists, match="tiny"):
        registered.register(seed=1)
    assert (registered.root / "tiny/1/model.onnx").read_bytes() == before


def test_what_cannot_be_registered(house: House) -> None:
    """A file that was not uploaded, a candidate's name and a file that does not fit are refused; nothing is left."""
    digest = house.upload(classes=5)
    with pytest.raises(NotFound, match="upload"):
        house.releases.register(declare(NAME), "0" * 64)
    with pytest.raises(InvalidInput, match="candidate"):
        house.releases.register(declare("models/tiny-candidate"), digest)
    with pytest.raises(InvalidInput, match="classes"):
        house.releases.register(declare(NAME), digest)
    with pytest.raises(NotFound):
        Catalog(house.store).model(NAME)
    assert house.triton.calls == []


def test_a_refused_registration_does_not_stand_in_the_way_of_the_next(house: House) -> None:
    """After Triton refused a file, the mended one is what is registered and served under the name."""
    house.triton.refuses = True
    with pytest.raises(NotReady):
        house.register(seed=0)
    house.triton.refuses = False
    house.register(seed=1)
    assert (house.root / "tiny/1/model.onnx").read_bytes() == build_onnx_classifier(seed=1)
    assert house.store.read_bytes(keys.model_file(NAME, 1)) == build_onnx_classifier(seed=1)


def test_publishing_serves_the_correction_beside_its_base(registered: House) -> None:
    """Callers get the new version, who wanted it is kept, and the version before it stays loaded."""
    release = registered.releases.publish(registered.correction(1, base_version=1), WHO)
    assert (release.kind, release.version, release.previous_version) == (Kind.KIND_RELEASED, 2, 1)
    assert release.correction == "runs/first/corrections/c1"
    assert (registered.champion(), registered.served()) == (2, [1, 2])
    assert (registered.root / "tiny/2/model.onnx").read_bytes() == b"file of c1"
    assert (release.actor, release.reason) == ("anna", "bold sevens")


def test_what_was_done_for_a_request_is_not_done_again(registered: House) -> None:
    """Asked again with the same id, a release and a rollback return what they did; another id is another wish."""
    first, second = replace(WHO, request_id="first"), replace(WHO, request_id="second")
    correction = registered.correction(1, base_version=1)
    release = registered.releases.publish(correction, first)
    assert registered.releases.publish(correction, first) == release
    undone = registered.releases.restore_previous(NAME, second)
    assert registered.releases.restore_previous(NAME, second) == undone
    assert (registered.champion(), undone.request_id) == (1, "second")
    with pytest.raises(NotReady, match="first"):
        registered.releases.restore_previous(NAME, replace(WHO, request_id="third"))


def test_a_registration_that_is_asked_again(house: House) -> None:
    """With the same id it returns the model; any other one finds the name taken."""
    asked = replace(NO_AUTHOR, request_id="first")
    file = house.upload()
    model = house.releases.register(declare(NAME), file, asked)
    assert house.releases.register(declare(NAME), file, asked) == model
    for author in (NO_AUTHOR, replace(NO_AUTHOR, request_id="second")):
        with pytest.raises(AlreadyExists):
            house.releases.register(declare(NAME), file, author)


def test_lineage_over_several_releases(registered: House) -> None:
    """Each release remembers what it replaced; going back goes along that line, and a new release starts from there."""
    house = registered
    house.releases.publish(house.correction(1, base_version=1), WHO)
    house.releases.publish(house.correction(2, base_version=2), WHO)
    assert house.served() == [2, 3]
    assert house.releases.restore_previous(NAME, WHO).version == 2
    assert house.releases.restore_previous(NAME, WHO).version == 1
    assert (house.champion(), house.served()) == (1, [1])
    with pytest.raises(NotReady, match="first"):
        house.releases.restore_previous(NAME, WHO)
    house.releases.publish(house.correction(3, base_version=1), WHO)
    assert (house.champion(), house.served()) == (4, [1, 4])
    assert house.releases.restore_previous(NAME, WHO).version == 1
    assert house.history() == [
        (Kind.KIND_REGISTERED, 1, 0),
        (Kind.KIND_RELEASED, 2, 1),
        (Kind.KIND_RELEASED, 3, 2),
        (Kind.KIND_ROLLED_BACK, 2, 3),
        (Kind.KIND_ROLLED_BACK, 1, 2),
        (Kind.KIND_RELEASED, 4, 1),
        (Kind.KIND_ROLLED_BACK, 1, 4),
    ]


def test_a_correction_is_published_once(registered: House) -> None:
    """Publishing again is refused with the version that it has, and changes nothing."""
    correction = registered.correction(1, base_version=1)
    registered.releases.publish(correction, WHO)
    with pytest.raises(AlreadyExists, match="version 2"):
        registered.releases.publish(correction, WHO)
    assert len(registered.history()) == 2


def test_a_correction_of_a_version_that_was_replaced_is_refused(registered: House) -> None:
    """A correction starts from the version that callers get; another one released meanwhile makes it stale."""
    late = registered.correction(2, base_version=1)
    registered.releases.publish(registered.correction(1, base_version=1), WHO)
    with pytest.raises(NotReady, match=r"version 1.*version 2"):
        registered.releases.publish(late, WHO)
    assert (registered.champion(), registered.served()) == (2, [1, 2])


def test_a_model_that_is_not_there(house: House) -> None:
    """Neither a release nor a way back exists for an unknown model."""
    with pytest.raises(NotFound, match="tiny"):
        house.releases.publish(house.correction(1, base_version=1), WHO)
    with pytest.raises(NotFound, match="tiny"):
        house.releases.restore_previous(NAME, WHO)


def test_a_release_that_died_before_its_record_is_taken_on(registered: House) -> None:
    """A version written by a process that died is released under its number, not written a second time."""
    correction = registered.correction(1, base_version=1)
    registered.triton.refuses = True
    with pytest.raises(NotReady):
        registered.releases.publish(correction, WHO)
    assert registered.champion() == 1
    registered.triton.refuses = False
    assert registered.releases.publish(correction, WHO).version == 2
    assert (registered.served(), len(registered.history())) == ([1, 2], 2)


def test_another_correction_does_not_take_over_a_version_that_died(registered: House) -> None:
    """A version that was written and never released stays unserved; the next correction gets a number of its own."""
    registered.triton.refuses = True
    with pytest.raises(NotReady):
        registered.releases.publish(registered.correction(1, base_version=1), WHO)
    registered.triton.refuses = False
    assert registered.releases.publish(registered.correction(2, base_version=1), WHO).version == 3
    assert registered.served() == [1, 3]
    assert (registered.root / "tiny/3/model.onnx").read_bytes() == b"file of c2"


def test_a_refused_release_leaves_the_champion_in_the_config(registered: House) -> None:
    """A Triton that restarts after a refused release still serves the champion."""
    registered.triton.refuses = True
    with pytest.raises(NotReady):
        registered.releases.publish(registered.correction(1, base_version=1), WHO)
    assert 1 in registered.served()


def test_candidates_are_served_beside_the_model(registered: House) -> None:
    """Each candidate is a new version under a name of its own; callers of the model get what they got."""
    model = Catalog(registered.store).model(NAME)
    candidates = [registered.releases.serve_candidate(model, file) for file in (b"one", b"two", b"three")]
    assert [(one.name, one.version) for one in candidates] == [("tiny-candidate", version) for version in (1, 2, 3)]
    assert registered.releases.serve_candidate(model, b"one").version == 1
    assert (registered.root / "tiny-candidate/2/model.onnx").read_bytes() == b"two"
    assert registered.served("tiny-candidate") == [1, 2, 3]
    assert (registered.champion(), registered.served()) == (1, [1])


def test_candidates_are_withdrawn_together(registered: House) -> None:
    """After a release none of them is served; without any, nothing happens."""
    registered.releases.withdraw_candidates(NAME)
    registered.releases.serve_candidate(Catalog(registered.store).model(NAME), b"one")
    registered.releases.withdraw_candidates(NAME)
    assert registered.triton.calls[-1] == ("unload", "tiny-candidate")
    assert registered.triton.calls.count(("unload", "tiny-candidate")) == 1
    assert not (registered.root / "tiny-candidate").exists()


def test_a_candidate_is_never_taken_for_another(registered: House) -> None:
    """Numbers go on after all were withdrawn, and a fifth candidate takes the place of the oldest."""
    model = Catalog(registered.store).model(NAME)
    registered.releases.serve_candidate(model, b"one")
    registered.releases.withdraw_candidates(NAME)
    versions = [registered.releases.serve_candidate(model, f"{n}".encode()).version for n in range(5)]
    assert versions == [2, 3, 4, 5, 6]
    assert registered.served("tiny-candidate") == [3, 4, 5, 6]
    assert registered.releases.serve_candidate(model, b"one").version == 1
    assert registered.served("tiny-candidate") == [1, 4, 5, 6]


def test_a_release_that_died_before_its_record_is_undone(registered: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers get a version that no record knows; the way back is to the one that the records name."""
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(registered.releases.history, "record", _die)
        registered.releases.publish(registered.correction(1, base_version=1), WHO)
    assert (registered.champion(), registered.served()) == (1, [1, 2])
    undone = registered.releases.restore_previous(NAME, WHO)
    assert (undone.version, undone.previous_version) == (1, 2)
    assert (registered.champion(), registered.served()) == (1, [1])


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_the_dead_left_at_the_gate_is_swept_away(registered: House) -> None:
    """A directory of hours ago goes with the next file at the gate; one of now is somebody's."""
    model = Catalog(registered.store).model(NAME)
    old, new = (registered.root / f"tiny-gate-{name}" for name in ("old", "new"))
    for directory in (old, new):
        directory.mkdir()
    os.utime(old, (0, 0))
    with registered.releases.serving(model, b"one"):
        assert not old.exists()
        assert new.exists()


def test_a_file_at_the_gate_is_served_for_the_while(registered: House) -> None:
    """It has a name that nobody else knows, and is gone afterwards, whatever happened."""
    model = Catalog(registered.store).model(NAME)
    with suppress(RuntimeError), registered.releases.serving(model, b"one"):
        [at_gate] = registered.root.glob("tiny-gate-*")
        assert registered.served(at_gate.name) == [1]
        raise RuntimeError
    assert registered.triton.calls[-2:] == [("load", at_gate.name), ("unload", at_gate.name)]
    assert not at_gate.exists()
