"""The publishing stage of a correction: the gate, then the release."""

from dataclasses import dataclass

from defuse import names
from defuse.errors import NotFound, NotReady
from defuse.v1 import correction_pb2, release_pb2, work_pb2

from services.corrector.external_triton import AnyReleases
from services.corrector.gate.decision import Gate
from services.corrector.guard.builder import GuardIssuer
from services.corrector.release_history import ChangeAuthor
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """The store, releases, gate and guards that the publishing stage uses."""

    store: ArtifactStore
    releases: AnyReleases
    gate: Gate
    guards: GuardIssuer


def publish(publisher: Publisher, work: work_pb2.PublishWork, job: Job) -> work_pb2.Event:
    """Release a correction that the gate allows, and build its guard.

    A current verdict of the gate is reused. A correction that is already released is not released again.
    """
    release = _published(publisher, work.publication, job)
    job.progress(0.95, "making the guard")
    publisher.guards.renew(names.parent(work.publication.correction), release)
    event = work_pb2.Event(subject=work.publication.name)
    event.published.release.CopyFrom(release)
    return event


def succeeded_correction(store: ArtifactStore, name: str) -> correction_pb2.Correction:
    """Return the record of a correction that succeeded.

    Raises NotReady for any other correction.
    """
    key = keys.correction(names.check(name, "runs/*/corrections/*"))
    try:
        return store.read_message(key, correction_pb2.Correction)
    except NotFound as error:
        raise NotReady(
            f"{name} is not finished, or failed; only a correction that succeeded can be released",
            reason="CORRECTION_NOT_FINISHED",
        ) from error


def _published(publisher: Publisher, publication: release_pb2.Publication, job: Job) -> release_pb2.Release:
    correction = succeeded_correction(publisher.store, publication.correction)
    history, request_id = publisher.releases.history, names.last(publication.name)
    if made := history.made(correction.model, request_id):
        return made
    history.check_publishable(correction)
    job.progress(0.1, "checking the candidate")
    verdict = publisher.gate.require_passed(correction, approver=publication.approver, reason=publication.reason)
    job.progress(0.9, "publishing")
    author = ChangeAuthor(
        actor=publication.actor,
        reason=publication.reason,
        verdict=verdict.name,
        approver="" if verdict.passed else publication.approver,
        request_id=request_id,
    )
    return publisher.releases.publish(correction, author)
