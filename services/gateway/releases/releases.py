"""Releases, of which each model has at most one under way.

The corrector does the work, and continues when the caller disconnects.
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from defuse import names
from defuse.errors import CODES, AlreadyExists, DeadlineExceeded, DefuseError, Internal, NotFound, NotReady, Unavailable
from defuse.v1 import correction_pb2, corrector_service_pb2, corrector_service_pb2_grpc, release_pb2, work_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.corrections.corrections import Corrections
from services.gateway.records.store import RecordStore, Work
from services.gateway.trials.trials import Trials
from services.runtime import telemetry
from services.runtime.queue import KEY, PUBLISH, Queue
from services.runtime.tls import ServiceClient

Publication = release_pb2.Publication
ENDED = (Publication.STATE_SUCCEEDED, Publication.STATE_FAILED)

# Retires the candidates of a model after its champion has changed.
Retire = Callable[[str], Awaitable[None]]


class ReleaseOperations:
    """Starts, finds and follows releases."""

    def __init__(self, queue: Queue, corrections: Corrections, retire: Retire) -> None:
        self._corrections = corrections
        self._retire = retire
        self.records: RecordStore[release_pb2.Publication] = RecordStore(
            queue, Publication, "publications", lambda publication: publication.state in ENDED
        )

    async def released(self, request: pb.ReleaseCorrectionRequest) -> release_pb2.Release:
        """Publish a correction and return its release.

        A repeated request waits for the same publication. Raises the error of a failed publication, and Conflict while
        another release of the model is under way.
        """
        publication = await self._find_or_create(request)
        async for latest in self.records.watch(publication.name):
            publication = latest
        if publication.state != Publication.STATE_SUCCEEDED:
            raise error_of(publication)
        return publication.release

    async def get(self, name: str) -> release_pb2.Publication:
        return await self.records.get(names.check(name, "models/*/publications/*"))

    def watch(self, name: str) -> AsyncIterator[release_pb2.Publication]:
        return self.records.watch(names.check(name, "models/*/publications/*"))

    async def cancel(self, name: str) -> release_pb2.Publication:
        """Return a release that has ended.

        Raises NotReady for one under way, which cannot be cancelled.
        """
        publication = await self.get(name)
        if publication.state not in ENDED:
            raise NotReady(
                f"the release of {publication.correction} cannot be cancelled; wait until it has ended, and "
                "take it back with `defuse rollback`",
                reason="NOT_CANCELLABLE",
            )
        return publication

    async def apply(self, event: work_pb2.Event) -> release_pb2.Publication:
        """Apply an event to its publication.

        Candidates are retired before the publication ends.
        """
        publication = await self.get(event.subject)
        model = names.parent(event.subject)
        if event.HasField("published") and publication.state not in ENDED:
            await self._retire_if_possible(model)
        ends = event.WhichOneof("kind") in {"published", "failed"}
        return await self.records.update(
            event.subject, lambda record: apply_event(record, event), unlock_key=_model_key(model) if ends else None
        )

    async def _retire_if_possible(self, model: str) -> None:
        """Retire the candidates of a model.

        While the corrector is unavailable they stay until the next release, which is harmless.
        """
        try:
            await self._retire(model)
        except (Unavailable, DeadlineExceeded) as error:
            telemetry.log().warning("candidates_not_withdrawn", model=model, error=error.message)

    async def _find_or_create(self, request: pb.ReleaseCorrectionRequest) -> release_pb2.Publication:
        correction = await self._corrections.get(request.name)
        publication = Publication(
            name=names.publication(names.last(correction.model), request.request_id or str(uuid.uuid4())),
            correction=correction.name,
            actor=request.actor,
            reason=request.reason,
            approver=request.approver,
            state=Publication.STATE_RUNNING,
            note="waiting for a corrector",
        )
        try:
            begun = await self.records.get(publication.name)
        except NotFound:
            return await self._create(publication, correction)
        if begun.correction != correction.name:
            raise AlreadyExists(
                f"request id {request.request_id!r} released {begun.correction}; choose a new one for each request",
                reason="REQUEST_ID_USED",
            )
        return begun

    async def _create(
        self, publication: release_pb2.Publication, correction: correction_pb2.Correction
    ) -> release_pb2.Publication:
        if correction.state != correction_pb2.Correction.STATE_SUCCEEDED:
            raise NotReady(
                f"{correction.name} is not finished, failed or was cancelled; only one that succeeded can be released",
                reason="CORRECTION_NOT_FINISHED",
            )
        publication.create_time.GetCurrentTime()
        publication.update_time.CopyFrom(publication.create_time)
        work = work_pb2.PublishWork(publication=publication)
        return await self.records.create(publication, [(PUBLISH, work)], lock_key=_model_key(correction.model))


def apply_event(publication: release_pb2.Publication, event: work_pb2.Event) -> Sequence[Work]:
    """Apply an event to a publication, in place, and return no work.

    Applying an event twice has the same effect as applying it once.
    """
    if publication.state in ENDED:
        return []
    kind = event.WhichOneof("kind")
    if kind == "progress":
        publication.progress = max(publication.progress, event.progress.progress)
        publication.note = event.progress.note
    elif kind == "published":
        publication.state = Publication.STATE_SUCCEEDED
        publication.progress, publication.note = 1.0, ""
        publication.release.CopyFrom(event.published.release)
    elif kind == "failed":
        publication.state = Publication.STATE_FAILED
        publication.error, publication.error_reason = event.failed.error, event.failed.reason
        publication.error_code = event.failed.code
    if publication.state in ENDED:
        publication.update_time.GetCurrentTime()
    return []


def error_of(publication: release_pb2.Publication) -> DefuseError:
    """Return the error that a publication failed with."""
    classes = {code.value[0]: cls for cls, code in CODES.items()}
    return classes.get(publication.error_code, Internal)(publication.error, reason=publication.error_reason)


def _model_key(model: str) -> str:
    """Return the Redis key of a model's release under way."""
    return f"{KEY}publishing:{model}"


class CandidateRetirement:
    """Takes candidates out of service."""

    def __init__(
        self, trials: Trials, corrector: "ServiceClient[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]"
    ) -> None:
        self._trials = trials
        self._corrector = corrector

    async def retire(self, model: str) -> None:
        """End the trial of a model and withdraw its candidates."""
        if trial := await self._trials.of_model(model):
            await self._trials.stop(trial.name)
        wanted = corrector_service_pb2.WithdrawCandidatesRequest(model=model)
        await self._corrector.call(lambda stub, **how: stub.WithdrawCandidates(wanted, **how))
