"""Reports of batches: delivery at least once, with exactly one effect.

A gateway can be killed between any two steps; comments at each step say how it is resumed.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from defuse.errors import AlreadyExists, DefuseError, InvalidInput, NotFound
from defuse.v1 import monitor_pb2, work_pb2

from services.gateway.monitoring import batches, config
from services.gateway.monitoring.batches import HOUR, ReceivedBatch, check_batch
from services.gateway.monitoring.config import MonitoredModel, MonitoredModels
from services.gateway.monitoring.observation_changes import Deletions
from services.gateway.monitoring.observation_index import ObservationIndex
from services.runtime import telemetry
from services.runtime.queue import REDIS_AWAY
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_LOOK_EVERY_S = 15.0


class BatchReports:
    """Stores reported batches and enqueues them for scoring."""

    def __init__(
        self, store: ArtifactStore, subjects: MonitoredModels, index: ObservationIndex, deletions: Deletions
    ) -> None:
        self._store = store
        self._subjects = subjects
        self._index = index
        self._deletions = deletions

    async def store(self, subject: MonitoredModel, batch: ReceivedBatch) -> int:
        """Store a batch once and enqueue it for scoring.

        Returns the number of its observations that are stored.
        """
        try:
            await asyncio.to_thread(check_batch, batch.observations, subject.model)
            # Nothing has happened yet. The batch id is bound to one key before anything is written there: after a crash
            # here, a repeated report uses the same key, in whatever hour it arrives.
            place = await self._place(subject, batch.id)
            if await self._has(place):
                await self._check_same(batch, place, subject.model.name)
            elif not await self._write(subject, batch, place):
                return 0
        except (AlreadyExists, InvalidInput):
            telemetry.OBSERVATIONS.labels(subject.model.name, "refused").inc(len(batch.observations))
            raise
        # After a crash before this line, the batch is stored but not enqueued: a repeated report arrives here, and
        # without one `run` finds it. After a crash behind it, the message exists and the caller retries.
        return await self._finish(subject, place)

    async def run(self) -> None:
        """Enqueue batches of dead gateways until the task is cancelled."""
        while True:
            try:
                await self.finish_abandoned()
            except (DefuseError, OSError, *REDIS_AWAY) as error:
                telemetry.log().warning("reports_retried", error=str(error), retry_s=_LOOK_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def finish_abandoned(self) -> None:
        """Enqueue batches that were stored only, and drop those never stored."""
        for place in await self._index.abandoned():
            try:
                subject = await self._subjects.of(place.partition("/observations/")[0])
            except NotFound:
                subject = None
            if subject and await self._has(place):
                await self._finish(subject, place)
            else:
                await self._index.forget(place)

    async def _place(self, subject: MonitoredModel, batch_id: str) -> str:
        """Return the key of a batch.

        It is the key under which storing began, or a new one in the present hour.
        """
        now = datetime.now(UTC)
        here, before = (_place(subject, now - timedelta(hours=hours), batch_id) for hours in (0, 1))
        place = await self._index.place(subject.model.name, batch_id, here, config.retention(subject.config))
        # A Redis that lost its data knows no batch; retries come soon enough to find the same hour.
        return before if place == here and await self._has(before) else place

    async def _has(self, place: str) -> bool:
        return await asyncio.to_thread(self._store.exists, keys.batch_record(place))

    async def _check_same(self, batch: ReceivedBatch, place: str, model_name: str) -> None:
        """Raise AlreadyExists when a batch id was used for another batch."""
        stored, said = set(await asyncio.to_thread(self._ids, place)), {one.id for one in batch.observations}
        found = await self._index.find(model_name, list(said), deleted=True)
        # Reported observations that are missing belong to another batch, or were deleted: the index knows their owner.
        # A Redis that lost its data knows neither the owner nor this batch.
        had = set().union(*found.values()) if place in found else said
        if not (stored <= said <= stored | had):
            raise AlreadyExists(
                f"batch {batch.id!r} is stored with other observations; report these under an id of their own",
                reason="BATCH_ID_USED",
                field="batch_id",
            )

    async def _write(self, subject: MonitoredModel, batch: ReceivedBatch, place: str) -> bool:
        """Store the observations of a batch that no other batch has.

        Returns whether there are any.
        """
        ids = [observation.id for observation in batch.observations]
        # An observation id belongs to one batch. After a crash here, a repeated report claims its own ids again;
        # without one, another batch can claim them once the claim is old, as the store does not have this batch.
        token, own = await self._index.claim(place, ids, config.retention(subject.config))
        telemetry.OBSERVATIONS.labels(subject.model.name, "repeated").inc(len(ids) - len(own))
        if not own:
            await self._index.forget(place)
            return False
        wanted = set(own)
        observations = [one for one in batch.observations if one.id in wanted]
        arrays = await asyncio.to_thread(batches.arrays_of, observations, subject.model)
        # After a crash here, nobody reads the arrays: they are overwritten, or deleted with their hour.
        await asyncio.to_thread(self._store.write_arrays, keys.observed_images(place), arrays)
        await self._index.check(place, token)
        record = batches.record_of(observations)
        await asyncio.to_thread(self._store.write_message, keys.batch_record(place), record)
        telemetry.OBSERVATIONS.labels(subject.model.name, "stored").inc(len(observations))
        return True

    async def _finish(self, subject: MonitoredModel, place: str) -> int:
        """Delete observations that were marked during storing, and enqueue the batch.

        Returns the number of remaining observations.
        """
        ids = await asyncio.to_thread(self._ids, place)
        if ids and (deleted := await self._index.deleted_of(place, ids)):
            await self._deletions.take_out(place, deleted)
            ids = await asyncio.to_thread(self._ids, place)
        if ids:
            await self._hand_on(subject, place)
        return len(ids)

    def _ids(self, place: str) -> Sequence[str]:
        """Return the stored observation ids of a batch, empty after their deletion."""
        with suppress(NotFound):
            record = self._store.read_message(keys.batch_record(place), monitor_pb2.ObservationBatch)
            return [observation.id for observation in record.observations]
        return []

    async def _hand_on(self, subject: MonitoredModel, place: str) -> None:
        work = work_pb2.WatchWork(
            model=subject.model.name,
            batch=place,
            guard=subject.guard,
            latents_alone=subject.config.keep == monitor_pb2.MonitorConfig.KEEP_LATENTS,
        )
        await self._index.enqueue_once(place, work, config.retention(subject.config))


def _place(subject: MonitoredModel, moment: datetime, batch_id: str) -> str:
    return f"{keys.observations(subject.model.name, moment.strftime(HOUR))}/{batch_id}"
