"""Guards in a tiny world; Triton's side of serving them is not there."""

from pathlib import Path

import pytest
from defuse.v1 import corrector_service_pb2, release_pb2

from services.corrector.guard.builder import GuardIssuer
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.unit.corrector.corrections import CLASSES, MODEL, REGIONS, RUN
from tests.unit.corrector.guard.world import annotate, searched


class Releases:
    """Counts what it is given to serve."""

    served = 0

    def serve_guard(self, *_: object) -> int:
        self.served += 1
        return self.served


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(f"file://{tmp_path}/store")
    searched(store)
    annotate(store, REGIONS[0], CLASSES[0])
    return store


@pytest.fixture
def guards(store: ArtifactStore) -> GuardIssuer:
    return GuardIssuer(store, Releases())  # type: ignore[arg-type]


def test_a_guard_is_in_the_store(guards: GuardIssuer, store: ArtifactStore) -> None:
    """Its record names what serves it, and its file lies beside it."""
    guard = guards.issue(RUN, 0.2)
    assert guard.name == f"{MODEL}/guards/1"
    assert (guard.guard_model, guard.guarded_model, guard.model_version) == ("tiny-guard", "tiny-guarded", 1)
    assert Catalog(store).guards(MODEL) == [guard]
    assert store.exists(keys.onnx_file(guard.name))


def test_a_request_is_answered_with_its_guard(guards: GuardIssuer) -> None:
    """Asked again with the same id, it is not made again; with another id it is."""

    def asked(request_id: str) -> str:
        request = corrector_service_pb2.IssueGuardRequest(run=RUN, false_alarm_rate=0.2, request_id=request_id)
        return guards.requested(request).name

    assert [asked("a"), asked("a"), asked("b"), asked("")] == [f"{MODEL}/guards/{number}" for number in (1, 1, 2, 3)]


def test_a_release_has_one_guard(guards: GuardIssuer, store: ArtifactStore) -> None:
    """A message that comes again makes no other one, and a release without held-out images does not fail."""
    release = release_pb2.Release(model=MODEL, version=1)
    release.create_time.GetCurrentTime()
    for _ in range(2):
        guards.renew(RUN, release)
    assert len(Catalog(store).guards(MODEL)) <= 1
    annotate(store, REGIONS[0], "", "VERDICT_INVALID")
    release.create_time.GetCurrentTime()
    guards.renew(RUN, release)
