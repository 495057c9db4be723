"""Corrections, of which each model has at most one under way.

The corrector's events update the state of a correction.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from defuse import names
from defuse.errors import NotFound, NotReady
from defuse.v1 import correction_pb2, run_pb2, work_pb2

from services.gateway.corrections.config import complete, trainings
from services.gateway.records.paging import Cursor, Page
from services.gateway.records.store import RecordStore, Work
from services.gateway.regions.regions import Regions
from services.gateway.runs.runs import Runs, check_distilled
from services.runtime.queue import CHOOSE, KEY, TRAIN, Queue
from services.runtime.worker import CANCEL_MARK_S, cancel_key
from services.storage import keys
from services.storage.catalog import Catalog

ENDED = (
    correction_pb2.Correction.STATE_SUCCEEDED,
    correction_pb2.Correction.STATE_FAILED,
    correction_pb2.Correction.STATE_CANCELLED,
)
# Share of the trainings in the progress of a correction; the choice has the rest.
_TRAINING_SHARE = 0.9


class Corrections:
    """Starts, finds, watches and cancels corrections."""

    def __init__(self, queue: Queue, catalog_: Catalog, runs: Runs, regions: Regions) -> None:
        self._queue = queue
        self._catalog = catalog_
        self._runs = runs
        self._regions = regions
        self.records: RecordStore[correction_pb2.Correction] = RecordStore(
            queue, correction_pb2.Correction, "corrections", lambda correction: correction.state in ENDED
        )

    async def create(self, run_name: str, config: correction_pb2.CorrectionConfig) -> correction_pb2.Correction:
        """Start a correction of the champion with a run's labelled regions."""
        whole = complete(config)
        run = await self._runs.get(run_name)
        check_distilled(run)
        labelled = await asyncio.to_thread(self._regions.labelled, run)
        if not labelled:
            raise NotReady(
                f"no region of run {names.last(run.name)!r} has a label; annotate at least one with `defuse annotate`",
                reason="NO_ANNOTATIONS",
            )
        await asyncio.to_thread(self._check_uploaded, whole.torch_factory.weights_digest)
        correction = await self._new(run, whole, labelled)
        works = [
            (TRAIN, work_pb2.TrainWork(correction=correction, training=position))
            for position in range(len(correction.trainings))
        ]
        return await self.records.create(correction, works, lock_key=_model_key(correction))

    async def get(self, name: str) -> correction_pb2.Correction:
        return await self.records.get(names.check(name, "runs/*/corrections/*", field="name"))

    async def page(self, run_name: str, cursor: Cursor) -> Page[correction_pb2.Correction]:
        """Return one page of the corrections of a run, oldest first."""
        await self._runs.get(run_name)
        return await cursor.page_of(self.records.iterate_after(run_name, cursor.after))

    def watch(self, name: str) -> AsyncIterator[correction_pb2.Correction]:
        return self.records.watch(names.check(name, "runs/*/corrections/*", field="name"))

    async def cancel(self, name: str) -> correction_pb2.Correction:
        """Cancel a correction; its trainings stop at their next step."""
        if (correction := await self.get(name)).state in ENDED:
            return correction
        event = work_pb2.Event(subject=name, cancelled=work_pb2.Cancelled())
        await asyncio.to_thread(self._catalog.store.write_message, keys.event(name, "cancelled"), event)
        return await self.apply(event)

    async def apply(self, event: work_pb2.Event) -> correction_pb2.Correction:
        """Apply an event to its correction.

        An event that ends the correction also cancels its remaining work.
        """
        model_key = _model_key(await self.get(event.subject))
        ends = event.WhichOneof("kind") in {"corrected", "failed", "cancelled"}
        if ends:
            await self._queue.redis.set(cancel_key(event.subject), "1", ex=CANCEL_MARK_S)
        return await self.records.update(
            event.subject, lambda record: apply_event(record, event), unlock_key=model_key if ends else None
        )

    def _check_uploaded(self, digest: str) -> None:
        if digest and not self._catalog.store.exists(keys.file(digest)):
            raise NotFound(f"no file {digest} was uploaded; upload the weights first", reason="FILE_NOT_FOUND")

    async def _new(
        self,
        run: run_pb2.Run,
        config: correction_pb2.CorrectionConfig,
        labelled: Sequence[correction_pb2.LabelledRegion],
    ) -> correction_pb2.Correction:
        number = len(await self.records.list(run.name)) + 1
        model = await asyncio.to_thread(self._catalog.model, run.config.model)
        name = names.correction(names.last(run.name), f"c{number}")
        correction = correction_pb2.Correction(
            name=name,
            config=config,
            model=model.name,
            base_version=model.champion_version,
            state=correction_pb2.Correction.STATE_RUNNING,
            note="waiting for a corrector",
            regions=labelled,
            trainings=trainings(config),
            operation=names.correction_operation(name),
        )
        correction.create_time.GetCurrentTime()
        correction.update_time.CopyFrom(correction.create_time)
        return correction


def apply_event(correction: correction_pb2.Correction, event: work_pb2.Event) -> Sequence[Work]:
    """Apply an event to a correction, in place, and return its work.

    The work is that of the next stage. Applying an event twice has the same effect as applying it once.
    """
    if correction.state in ENDED:
        return []
    kind = event.WhichOneof("kind")
    if kind == "progress":
        _on_progress(correction, event.progress)
    elif kind == "trained":
        return _on_trained(correction, event.trained)
    elif kind == "corrected":
        correction.state = correction_pb2.Correction.STATE_SUCCEEDED
        correction.progress, correction.note = 1.0, ""
        correction.result.CopyFrom(event.corrected.result)
    elif kind == "failed":
        correction.state = correction_pb2.Correction.STATE_FAILED
        correction.error, correction.error_reason = event.failed.error, event.failed.reason
    elif kind == "cancelled":
        correction.state = correction_pb2.Correction.STATE_CANCELLED
        correction.note = "cancelled"
    if correction.state in ENDED:
        correction.update_time.GetCurrentTime()
    return []


def _on_progress(correction: correction_pb2.Correction, progress: work_pb2.StageProgress) -> None:
    correction.note = progress.note
    if progress.HasField("training"):
        training = correction.trainings[progress.training]
        training.progress = max(training.progress, progress.progress)
        correction.progress = _share_trained(correction)
    else:
        share = _TRAINING_SHARE + (1 - _TRAINING_SHARE) * progress.progress
        correction.progress = max(correction.progress, share if _all_trained(correction) else 0.0)


def _on_trained(correction: correction_pb2.Correction, trained: work_pb2.Trained) -> Sequence[Work]:
    training = correction.trainings[trained.position]
    if _ended(training):
        return []
    training.CopyFrom(trained.training)
    training.progress = 1.0
    correction.progress = _share_trained(correction)
    if not _all_trained(correction):
        return []
    return [(CHOOSE, work_pb2.ChooseWork(correction=correction))]


def _share_trained(correction: correction_pb2.Correction) -> float:
    return _TRAINING_SHARE * sum(training.progress for training in correction.trainings) / len(correction.trainings)


def _all_trained(correction: correction_pb2.Correction) -> bool:
    return all(_ended(training) for training in correction.trainings)


def _ended(training: correction_pb2.Training) -> bool:
    return bool(training.points or training.error)


def _model_key(correction: correction_pb2.Correction) -> str:
    """Return the Redis key of a model's correction under way."""
    return f"{KEY}correcting:{correction.model}"
