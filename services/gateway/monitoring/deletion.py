"""Deletion of observations: on request, and after their retention."""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from defuse import names
from defuse.errors import DefuseError, InvalidInput, NotFound
from defuse.v1 import monitor_pb2

from services.gateway.monitoring import batches, config
from services.gateway.monitoring.batches import HOUR
from services.gateway.monitoring.config import MonitoredModels, Told
from services.gateway.monitoring.observation_index import ObservationIndex
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore

MOST_IDS = 10_000


class Deletions:
    """Deletes observations, and tells of which batch they were."""

    def __init__(self, store: ArtifactStore, subjects: MonitoredModels, index: ObservationIndex, told: Told) -> None:
        self._store = store
        self._told = told
        self._subjects = subjects
        self._index = index

    async def delete(self, model_name: str, ids: Sequence[str]) -> int:
        """Take observations out of the store; return how many of the ids were known."""
        if len(ids) > MOST_IDS:
            raise InvalidInput(
                f"{len(ids)} ids are more than {MOST_IDS}, the limit; send them in several calls",
                reason="TOO_LARGE",
                field="ids",
            )
        subject = await self._subjects.of(names.check(model_name, "models/*", field="model"))
        found = await self._index.find(subject.model.name, list(dict.fromkeys(ids)), deleted=True)
        for batch, own in found.items():
            # First: who stores the batch at this moment looks for these marks before it hands the batch on, and takes
            # out what they are at. Killed behind this, they are found again by who asks again.
            await self._index.mark_deleted(batch, own, config.retention(subject.config))
            await self.take_out(batch, own)
            await self._told(subject, batch)
        return sum(map(len, found.values()))

    async def take_out(self, batch: str, ids: Sequence[str]) -> None:
        """Take observations that are marked as deleted out of each file of a batch; again it changes nothing."""
        async with self._index.alone(batch):
            await asyncio.to_thread(self._take_out, batch, ids)

    def _take_out(self, batch: str, ids: Sequence[str]) -> None:
        """Take observations out of each file of a batch.

        The record goes first. Who looks at the batch meanwhile reads the record again when it has written what it saw:
        either it finds them missing there, or what it has written is there to be changed here.
        """
        if not self._keep_record(batch, ids):
            self._store.remove_below(batch)
            return
        gone = set(map(keys.observation_digest, ids))
        self._keep_rows(keys.observed_images(batch), gone)
        for key in self._store.keys(keys.truths(batch)):
            self._keep_said(key, ids)
        self._keep_rows(keys.watched(batch), gone)

    def _keep_record(self, batch: str, ids: Collection[str]) -> bool:
        """Write the record without these observations; return whether others are left, or a record may still come."""
        key = keys.reported(batch)
        if not self._store.exists(key):
            return True
        left = _without(self._store.read_message(key, monitor_pb2.ObservationBatch), ids)
        if left.observations:
            self._store.write_message(key, left)
        else:
            self._store.remove(key)
        return bool(left.observations)

    def _keep_rows(self, key: str, gone: Collection[bytes]) -> None:
        try:
            arrays = self._store.read_arrays(key)
        except NotFound:
            return  # not looked at yet, or images are not kept
        if (kept := batches.without(arrays, gone)) is not None:
            self._store.write_arrays(key, kept)

    def _keep_said(self, key: str, ids: Collection[str]) -> None:
        left = _without(self._store.read_message(key, monitor_pb2.ObservationBatch), ids)
        if left.observations:
            self._store.write_message(key, left)
        else:
            self._store.remove(key)


def _without(batch: monitor_pb2.ObservationBatch, ids: Collection[str]) -> monitor_pb2.ObservationBatch:
    gone = set(ids)
    return monitor_pb2.ObservationBatch(observations=[one for one in batch.observations if one.id not in gone])


_LOOK_EVERY_S = 60.0


class Retention:
    """Removes what is old."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def run(self) -> None:
        """Look again and again until the task is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.remove_old, datetime.now(UTC))
            except (DefuseError, OSError) as error:
                telemetry.log().warning("retention_waits", error=str(error), retry_s=_LOOK_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    def remove_old(self, now: datetime) -> None:
        """Remove the hours of all models that are past their retention."""
        for model_name in self._store.keys("models"):
            if hours := self._store.keys(keys.observed_hours(model_name)):
                kept = config.retention(config.read(self._store, model_name))
                for hour in past(hours, kept, now):
                    self._remove(hour)

    def _remove(self, hour: str) -> None:
        for batch in self._store.keys(hour):
            self._store.remove(keys.reported(batch))  # first: it is there whole or not at all
        self._store.remove_below(hour)
        telemetry.log().info("observations_expired", hour=hour)


def past(hours: Iterable[str], kept: timedelta, now: datetime) -> Iterator[str]:
    """Yield the keys of hours whose last moment is further away than observations are kept."""
    for hour in hours:
        with suppress(ValueError):  # of something that is no hour
            begin = datetime.strptime(names.last(hour), HOUR).replace(tzinfo=UTC)
            if begin + timedelta(hours=1) + kept < now:
                yield hour
