"""The stage `publish` over a store and a repository in a temporary folder; the gate says what a test lets it say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from defuse.errors import AlreadyExists, NotReady
from defuse.v1 import correction_pb2, gate_pb2, release_pb2, work_pb2

from services.corrector.guard.builder import GuardIssuer
from services.corrector.publishing import Publisher, publish
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.unit.conftest import RememberingTriton
from tests.unit.corrector.test_own_triton import House

ONE = "runs/first/corrections/c1"


@dataclass
class Gate:
    """Says one verdict, and remembers who wanted to pass in spite of it."""

    passed: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)

    def require_passed(self, _: correction_pb2.Correction, *, approver: str, reason: str) -> gate_pb2.GateVerdict:
        self.asked.append((approver, reason))
        if not self.passed and not approver:
            raise NotReady("it does not pass", reason="GATE_NOT_PASSED")
        return gate_pb2.GateVerdict(name="models/tiny/verdicts/v1", passed=self.passed)


@pytest.fixture
def house(store: ArtifactStore, tmp_path: Path, triton: RememberingTriton) -> House:
    """A registered model with a finished correction."""
    house = House(store, tmp_path / "models", triton)
    house.register()
    store.write_message(keys.correction(ONE), house.correction(1, base_version=1))
    return house


def wanted(request_id: str = "one", **fields: Any) -> work_pb2.PublishWork:
    said = {"correction": ONE, "actor": "ann", "reason": "bold sevens", **fields}
    return work_pb2.PublishWork(
        publication=release_pb2.Publication(name=f"models/tiny/publications/{request_id}", **said)
    )


def done(house: House, work: work_pb2.PublishWork, gate: Gate | None = None) -> work_pb2.Event:
    guards = GuardIssuer(house.store, house.releases)
    publisher = Publisher(store=house.store, releases=house.releases, gate=gate or Gate(), guards=guards)  # type: ignore[arg-type]
    return publish(publisher, work, Job(work.publication.name, lambda _: None))


def test_a_correction_is_published(house: House) -> None:
    """The release has its actor, reason and verdict."""
    event = done(house, wanted())
    release = event.published.release
    assert event.subject == "models/tiny/publications/one"
    assert (release.version, release.correction, house.champion()) == (2, ONE, 2)
    assert (release.actor, release.reason, release.verdict) == ("ann", "bold sevens", "models/tiny/verdicts/v1")
    assert (release.approver, release.request_id) == ("", "one")


def test_a_message_that_comes_twice(house: House) -> None:
    """It has one effect, and the gate is not asked again; another release of the same correction is refused."""
    gate = Gate()
    assert done(house, wanted(), gate) == done(house, wanted(), gate)
    assert (len(gate.asked), house.champion(), len(house.history())) == (1, 2, 2)
    with pytest.raises(AlreadyExists, match="released already"):
        done(house, wanted("two"))


def test_what_does_not_pass_the_gate(house: House) -> None:
    """It is refused, or released with who approves it in spite of it."""
    with pytest.raises(NotReady, match="does not pass"):
        done(house, wanted(), Gate(passed=False))
    assert house.champion() == 1
    gate = Gate(passed=False)
    assert done(house, wanted("two", approver="bea"), gate).published.release.approver == "bea"
    assert gate.asked == [("bea", "bold sevens")]


def test_an_approver_that_was_not_needed(house: House) -> None:
    """The approver of a passed release is not stored."""
    assert done(house, wanted(approver="bea")).published.release.approver == ""


def test_a_correction_that_is_not_finished(house: House) -> None:
    """It is refused by its name."""
    with pytest.raises(NotReady, match="runs/first/corrections/c9 is not finished"):
        done(house, wanted(correction="runs/first/corrections/c9"))
