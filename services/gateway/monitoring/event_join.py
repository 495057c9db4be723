"""The join of the request and response events of an inference.

Both become one observation, in whatever order they arrive. Senders do not wait for the
store: an event is durable once it is in Redis, and complete pairs are stored from
there, many at once.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from defuse.errors import DefuseError, InvalidInput, NotFound
from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.monitoring.batches import ReceivedBatch, check_batch
from services.gateway.monitoring.cloud_events import REQUEST, RESPONSE, CloudEvent, event_part, merge_parts
from services.gateway.monitoring.config import MonitoredModels
from services.gateway.monitoring.reports import BatchReports
from services.runtime import telemetry
from services.runtime.queue import KEY, REDIS_AWAY, Queue

# Seconds that an event waits for its counterpart, the number and bytes of waiting events, oldest dropped first, and the
# pairs that are stored at once.
LONGEST_WAIT_S = 600
MOST_WAITING = 10_000
MOST_BYTES = 256 << 20
MOST_AT_ONCE = 200
_WAITING, _WHOLE = f"{KEY}events:waiting", f"{KEY}events:whole"
_MODEL = "model"
_FIELDS_OF_WHOLE = 3


@dataclass(frozen=True, kw_only=True)
class EventPair:
    """The request and response of one inference that have arrived so far."""

    key: str
    model: str
    parts: dict[str, monitor_pb2.ObservationBatch]

    @property
    def complete(self) -> bool:
        return len(self.parts) == 2

    @property
    def missing(self) -> str:
        """Return the missing part of an incomplete pair."""
        return RESPONSE if REQUEST in self.parts else REQUEST


class PendingEvents:
    """Events in Redis that wait for their counterpart."""

    def __init__(self, queue: Queue) -> None:
        self._redis = queue.redis

    async def put(self, model_name: str, event_id: str, half: str, batch: monitor_pb2.ObservationBatch) -> None:
        """Store one part of an event, unless its pair was settled before."""
        key = _key(model_name, event_id)
        if await self._redis.exists(_settled(key)):
            return
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping={half: batch.SerializeToString(), _MODEL: model_name})
            pipe.zadd(_WAITING, {key: time.time()}, nx=True)
            pipe.hlen(key)
            *_, fields = await pipe.execute()
        # After a crash at this point, `late` finds the pair.
        if fields == _FIELDS_OF_WHOLE:
            await self._redis.zadd(_WHOLE, {key: time.time()})

    async def take_complete(self) -> Sequence[EventPair]:
        """Remove some complete pairs from the queue and return them.

        No other gateway gets these pairs until they are given back or have waited too long.
        """
        found = await self._redis.zpopmin(_WHOLE, MOST_AT_ONCE)
        pairs = [await self._read(key.decode()) for key, _ in found]
        return [pair for pair in pairs if pair.complete]  # settled by others meanwhile

    async def give_back(self, pairs: Sequence[EventPair]) -> None:
        """Return complete pairs to the queue."""
        if pairs:
            await self._redis.zadd(_WHOLE, {pair.key: time.time() for pair in pairs})

    async def settle(self, pair: EventPair) -> bool:
        """Remove a pair, and return whether this gateway removed it.

        Several gateways may try, and one of them succeeds.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(_WAITING, pair.key)
            pipe.delete(pair.key)
            pipe.set(_settled(pair.key), "1", ex=LONGEST_WAIT_S)
            removed, _, _ = await pipe.execute()
        return bool(removed)

    async def late(self) -> Sequence[EventPair]:
        """Return the pairs that have waited too long."""
        keys = await self._redis.zrangebyscore(_WAITING, "-inf", time.time() - LONGEST_WAIT_S)
        return [await self._read(key.decode()) for key in keys]

    async def too_many(self, most: int = MOST_WAITING, most_bytes: int = MOST_BYTES) -> Sequence[EventPair]:
        """Return the oldest pairs that exceed the bounds on number and bytes."""
        keys = await self._redis.zrevrange(_WAITING, 0, -1)
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hstrlen(key, REQUEST)
                pipe.hstrlen(key, RESPONSE)
            sizes = await pipe.execute()
        left, beyond = most_bytes, []
        for number, (key, *part_sizes) in enumerate(zip(keys, sizes[::2], sizes[1::2], strict=True)):
            left -= sum(part_sizes)
            if number >= most or left < 0:
                beyond.append(await self._read(key.decode()))
        return beyond

    async def _read(self, key: str) -> EventPair:
        found = await self._redis.hgetall(key)
        model_name = found.pop(_MODEL.encode(), b"").decode()
        parts = {half.decode(): monitor_pb2.ObservationBatch.FromString(data) for half, data in found.items()}
        return EventPair(key=key, model=model_name, parts=parts)


def _key(model_name: str, event_id: str) -> str:
    return f"{KEY}events:{hashlib.sha256(f'{model_name}:{event_id}'.encode()).hexdigest()[:32]}"


def _settled(key: str) -> str:
    return f"{key}:settled"


_STORE_EVERY_S = 0.2
_LOOK_EVERY_S = 1.0


class EventJoiner:
    """Joins request and response events, and stores the resulting observations."""

    def __init__(self, pending: PendingEvents, reports: BatchReports, subjects: MonitoredModels) -> None:
        self._pending = pending
        self._reports = reports
        self._subjects = subjects

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return the coroutines that run as long as the gateway."""
        return [
            lambda: _call_periodically(self.store_complete, _STORE_EVERY_S),
            lambda: _call_periodically(self.clean_up, _LOOK_EVERY_S),
        ]

    async def take(self, model_name: str, event: CloudEvent) -> None:
        """Store an event until its counterpart arrives.

        The event is durable once this method returns. Raises InvalidInput for an event that could never be stored,
        because its sender cannot be informed later.
        """
        subject = await self._subjects.of(model_name)
        half, batch = await asyncio.to_thread(event_part, event, subject.model)
        await asyncio.to_thread(check_batch, batch.observations, subject.model)
        await self._pending.put(subject.model.name, event.id, half, batch)

    async def store_complete(self) -> None:
        """Store all complete pairs."""
        while pairs := await self._pending.take_complete():
            try:
                await self._store(pairs)
            except BaseException:
                await self._pending.give_back(pairs)
                raise

    async def clean_up(self) -> None:
        """Drop incomplete pairs that waited too long or exceed the bounds.

        Complete ones among them, left by gateways that died, return to the queue.
        """
        late, beyond = await self._pending.late(), await self._pending.too_many()
        await self._pending.give_back([pair for pair in (*late, *beyond) if pair.complete])
        for pair in late:
            if not pair.complete:
                await self._give_up(pair, f"no_{pair.missing}")
        for pair in beyond:
            if not pair.complete:
                await self._give_up(pair, "too_many_waiting")

    async def _store(self, pairs: Sequence[EventPair]) -> None:
        """Store pairs, then remove them.

        A crash in between makes another gateway store them again, which changes nothing.
        """
        found: dict[str, list[EventPair]] = {}
        for pair in pairs:
            found.setdefault(pair.model, []).append(pair)
        for model_name, of_model in found.items():
            try:
                await self._store_of(model_name, of_model)
            except (NotFound, InvalidInput) as error:  # the model was deleted or replaced meanwhile
                for pair in of_model:
                    await self._give_up(pair, "model_changed", error=error.message)

    async def _store_of(self, model_name: str, pairs: Sequence[EventPair]) -> None:
        subject = await self._subjects.of(model_name)
        observations: list[monitor_pb2.Observation] = []
        for pair in pairs:
            observations += await self._observations(pair, subject.model)
        await self._reports.store(subject, ReceivedBatch(id=uuid.uuid4().hex, observations=observations))
        for pair in pairs:
            await self._pending.settle(pair)

    async def _observations(self, pair: EventPair, model: model_pb2.Model) -> Sequence[monitor_pb2.Observation]:
        """Return the observations of a pair.

        An invalid pair is dropped and has none, so that the other pairs do not fail with it.
        """
        reason = "halves_differ"
        try:
            found = merge_parts(pair.parts[REQUEST], pair.parts[RESPONSE])
            reason = "model_changed"
            await asyncio.to_thread(check_batch, found, model)
        except InvalidInput as error:
            await self._give_up(pair, reason, error=error.message)
            return []
        return found

    async def _give_up(self, pair: EventPair, reason: str, **why: str) -> None:
        rows = max((len(half.observations) for half in pair.parts.values()), default=0)
        if await self._pending.settle(pair):
            telemetry.OBSERVATIONS.labels(pair.model, reason).inc(rows)
            telemetry.log().warning("event_dropped", model=pair.model, reason=reason, observations=rows, **why)


async def _call_periodically(call: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Call periodically until the task is cancelled.

    A failure of a dependency is logged, and the call is retried.
    """
    while True:
        try:
            await call()
        except (DefuseError, OSError, *REDIS_AWAY) as error:
            telemetry.log().warning("events_retried", error=str(error))
            await asyncio.sleep(_LOOK_EVERY_S)
        await asyncio.sleep(pause_s)
