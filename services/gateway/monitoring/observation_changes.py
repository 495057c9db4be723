"""Later changes of stored observations: ground truth, deletions and retention.

Every gateway enforces the retention. An hour that one gateway has deleted no longer exists for the others.
"""

import asyncio
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from defuse import names
from defuse.errors import DefuseError, InvalidInput, NotFound
from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.monitoring import batches, config
from services.gateway.monitoring.batches import HOUR
from services.gateway.monitoring.config import MonitoredModels, OnChange
from services.gateway.monitoring.observation_index import ObservationIndex
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore


def truth_counts(store: ArtifactStore, batch: str, classes: Sequence[str]) -> str:
    """Return the numbers of correct and of known predictions of a batch.

    They are two numbers in a text, over the observations with truth and prediction. The text is empty when there are
    none.
    """
    truths = _truths(store, batch)
    try:
        seen = store.read_arrays(keys.observation_scores(batch)) if truths else {}
    except NotFound:
        return ""
    right = [
        classes[predicted] == truths[row.tobytes()]
        for row, predicted in zip(seen.get("id", ()), seen.get("predicted", ()), strict=True)
        if predicted >= 0 and row.tobytes() in truths
    ]
    return f"{sum(right)} {len(right)}" if right else ""


def total_counts(counts: Iterable[bytes]) -> tuple[int, int]:
    """Return the sums of correct and known counts over batches."""
    right, of = 0, 0
    for one in counts:
        some, some_of = map(int, one.split()[:2])
        right, of = right + some, of + some_of
    return right, of


def _truths(store: ArtifactStore, batch: str) -> dict[bytes, str]:
    """Return the true classes of observations by row id.

    The latest statement about an observation counts.
    """
    try:
        record = store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
    except NotFound:
        return {}
    said = [
        record,
        *(store.read_message(key, monitor_pb2.ObservationBatch) for key in store.keys(keys.truths(batch))),
    ]
    return {keys.observation_digest(one.id): one.truth for word in said for one in word.observations if one.truth}


MOST_TRUTHS = 10_000


class GroundTruth:
    """Stores ground truth and reports the affected batches."""

    def __init__(
        self, store: ArtifactStore, subjects: MonitoredModels, index: ObservationIndex, on_change: OnChange
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._subjects = subjects
        self._index = index

    async def attach(self, model_name: str, truths: Mapping[str, str]) -> int:
        """Store the true classes of observations, by id.

        Returns the number of ids that belong to stored observations.
        """
        subject = await self._subjects.of(names.check(model_name, "models/*", field="model"))
        model = subject.model
        _check(truths, model)
        attached = 0
        for batch, ids in (await self._index.find(model.name, list(truths))).items():
            await self._index.check_settled(batch)
            # Excludes a concurrent deletion, after which the truth would remain.
            async with self._index.alone(batch):
                there = (await self._index.find(model.name, ids)).get(batch, [])
                said = [monitor_pb2.Observation(id=one, truth=truths[one]) for one in there]
                attached += await asyncio.to_thread(self._keep, batch, said)
            await self._on_change(subject, batch)
        return attached

    def _keep(self, batch: str, said: list[monitor_pb2.Observation]) -> int:
        if not said or not self._store.exists(keys.batch_record(batch)):
            return 0
        message = monitor_pb2.ObservationBatch(observations=said)
        before = self._store.keys(keys.truths(batch))
        # A statement repeated after a lost answer is not stored twice.
        if not before or self._store.read_message(before[-1], monitor_pb2.ObservationBatch) != message:
            key = keys.truth(batch, datetime.now(UTC), uuid.uuid4().hex[:6])
            self._store.write_message(key, message)
        return len(said)


def _check(truths: Mapping[str, str], model: model_pb2.Model) -> None:
    if len(truths) > MOST_TRUTHS:
        raise InvalidInput(
            f"{len(truths)} truths are more than {MOST_TRUTHS}, the limit; send them in several calls",
            reason="TOO_LARGE",
            field="truths",
        )
    known = set(model.classes)
    for one, truth in truths.items():
        if truth not in known:
            raise InvalidInput(
                f"observation {one[:128]!r} has the true class {truth[:80]!r}, which is not a class of "
                f"{names.last(model.name)!r}; its classes are {', '.join(model.classes[:20])}",
                reason="UNKNOWN_CLASS",
                field="truths",
            )


MOST_IDS = 10_000


class Deletions:
    """Deletes observations and reports the affected batches."""

    def __init__(
        self, store: ArtifactStore, subjects: MonitoredModels, index: ObservationIndex, on_change: OnChange
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._subjects = subjects
        self._index = index

    async def delete(self, model_name: str, ids: Sequence[str]) -> int:
        """Delete observations from the store.

        Returns the number of ids that were known.
        """
        if len(ids) > MOST_IDS:
            raise InvalidInput(
                f"{len(ids)} ids are more than {MOST_IDS}, the limit; send them in several calls",
                reason="TOO_LARGE",
                field="ids",
            )
        subject = await self._subjects.of(names.check(model_name, "models/*", field="model"))
        found = await self._index.find(subject.model.name, list(dict.fromkeys(ids)), deleted=True)
        for batch, own in found.items():
            # Marked first: a gateway that stores the batch concurrently checks these marks before it hands the batch
            # on, and deletes the marked rows. After a crash at this point, a repeated request finds the marks.
            await self._index.mark_deleted(batch, own, config.retention(subject.config))
            await self.take_out(batch, own)
            await self._on_change(subject, batch)
        return sum(map(len, found.values()))

    async def take_out(self, batch: str, ids: Sequence[str]) -> None:
        """Delete marked observations from every file of a batch.

        It can be repeated after a crash.
        """
        async with self._index.alone(batch):
            await asyncio.to_thread(self._take_out, batch, ids)

    def _take_out(self, batch: str, ids: Sequence[str]) -> None:
        """Delete observations from each file of a batch.

        The record goes first. A concurrent scorer reads the record again after it has
        written its result: it either finds the rows missing, or its result exists in
        time to be changed here.
        """
        if not self._keep_record(batch, ids):
            self._store.remove_below(batch)
            return
        gone = set(map(keys.observation_digest, ids))
        self._keep_rows(keys.observed_images(batch), gone)
        for key in self._store.keys(keys.truths(batch)):
            self._keep_said(key, ids)
        self._keep_rows(keys.observation_scores(batch), gone)

    def _keep_record(self, batch: str, ids: Collection[str]) -> bool:
        """Rewrite the record without these observations.

        Returns whether others remain, or a record may still be written.
        """
        key = keys.batch_record(batch)
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
            return  # not scored yet, or images are not kept
        if (kept := batches.without_rows(arrays, gone)) is not None:
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
    """Deletes observations after their retention."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def run(self) -> None:
        """Delete expired hours periodically until the task is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.remove_old, datetime.now(UTC))
            except (DefuseError, OSError) as error:
                telemetry.log().warning("retention_retried", error=str(error), retry_s=_LOOK_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    def remove_old(self, now: datetime) -> None:
        """Delete the hours of all models that are past their retention."""
        for model_name in self._store.keys("models"):
            if hours := self._store.keys(keys.observed_hours(model_name)):
                kept = config.retention(config.read_config(self._store, model_name))
                for hour in expired_hours(hours, kept, now):
                    self._remove(hour)

    def _remove(self, hour: str) -> None:
        for batch in self._store.keys(hour):
            self._store.remove(keys.batch_record(batch))  # first, so that the hour is seen whole or not at all
        self._store.remove_below(hour)
        telemetry.log().info("observations_expired", hour=hour)


def expired_hours(hours: Iterable[str], kept: timedelta, now: datetime) -> Iterator[str]:
    """Yield the keys of hours that ended longer ago than the retention."""
    for hour in hours:
        with suppress(ValueError):  # not the folder of an hour
            begin = datetime.strptime(names.last(hour), HOUR).replace(tzinfo=UTC)
            if begin + timedelta(hours=1) + kept < now:
                yield hour
