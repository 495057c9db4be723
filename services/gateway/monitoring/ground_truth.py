"""Ground truth of observations, attached later, and the accuracy that follows from it."""

import asyncio
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from defuse import names
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.monitoring.config import MonitoredModels, Told
from services.gateway.monitoring.observation_index import ObservationIndex
from services.storage import keys
from services.storage.artifacts import ArtifactStore


def counts(store: ArtifactStore, batch: str, classes: Sequence[str]) -> str:
    """Return `right of` for a batch: its observations whose truth and prediction are known; nothing without any."""
    truths = _truths(store, batch)
    try:
        seen = store.read_arrays(keys.watched(batch)) if truths else {}
    except NotFound:
        return ""
    right = [
        classes[predicted] == truths[row.tobytes()]
        for row, predicted in zip(seen.get("id", ()), seen.get("predicted", ()), strict=True)
        if predicted >= 0 and row.tobytes() in truths
    ]
    return f"{sum(right)} {len(right)}" if right else ""


def total(told: Iterable[bytes]) -> tuple[int, int]:
    """Return how many are right, of how many, over batches."""
    right, of = 0, 0
    for one in told:
        some, some_of = map(int, one.split()[:2])
        right, of = right + some, of + some_of
    return right, of


def _truths(store: ArtifactStore, batch: str) -> dict[bytes, str]:
    """Return what observations really show, by the names of their rows; the last word counts."""
    try:
        record = store.read_message(keys.reported(batch), monitor_pb2.ObservationBatch)
    except NotFound:
        return {}
    said = [
        record,
        *(store.read_message(key, monitor_pb2.ObservationBatch) for key in store.keys(keys.truths(batch))),
    ]
    return {keys.observation_digest(one.id): one.truth for word in said for one in word.observations if one.truth}


MOST_TRUTHS = 10_000


class GroundTruth:
    """Keeps what is said, and tells of which batch it was."""

    def __init__(self, store: ArtifactStore, subjects: MonitoredModels, index: ObservationIndex, told: Told) -> None:
        self._store = store
        self._told = told
        self._subjects = subjects
        self._index = index

    async def attach(self, model_name: str, truths: Mapping[str, str]) -> int:
        """Store what observations show, by their ids; return how many of them are known."""
        subject = await self._subjects.of(names.check(model_name, "models/*", field="model"))
        model = subject.model
        _check(truths, model)
        attached = 0
        for batch, ids in (await self._index.find(model.name, list(truths))).items():
            await self._index.check_settled(batch)
            # Not while some of them are being deleted, whose truth would stay.
            async with self._index.alone(batch):
                there = (await self._index.find(model.name, ids)).get(batch, [])
                said = [monitor_pb2.Observation(id=one, truth=truths[one]) for one in there]
                attached += await asyncio.to_thread(self._keep, batch, said)
            await self._told(subject, batch)
        return attached

    def _keep(self, batch: str, said: list[monitor_pb2.Observation]) -> int:
        if not said or not self._store.exists(keys.reported(batch)):
            return 0
        message = monitor_pb2.ObservationBatch(observations=said)
        before = self._store.keys(keys.truths(batch))
        # Said again, by somebody who did not hear the answer, it is not kept twice.
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
                f"observation {one[:128]!r} is said to show {truth[:80]!r}, which is no class of "
                f"{names.last(model.name)!r}; its classes are {', '.join(model.classes[:20])}",
                reason="UNKNOWN_CLASS",
                field="truths",
            )
