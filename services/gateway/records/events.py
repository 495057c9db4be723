"""The event consumer: stores each event and applies it to its record."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from defuse import names
from defuse.errors import DefuseError, NotFound, StoreFull, Unavailable
from defuse.v1 import work_pb2

from services.runtime import telemetry, tracing
from services.runtime.queue import EVENTS, MAX_DELIVERIES, Delivery, Queue
from services.runtime.worker import RETRY_S, report_queue_metrics, retry_while_redis_is_away
from services.storage import keys
from services.storage.artifacts import ArtifactStore

ApplyEvent = Callable[[work_pb2.Event], Awaitable[Any]]
# Events about traffic are not stored: the batches are their record.
_UNRECORDED = "models"


class EventConsumer:
    """Consumes the stream `events`.

    The collection of an event's subject determines which function applies it.
    """

    def __init__(self, queue: Queue, store: ArtifactStore, owners: Mapping[str, ApplyEvent]) -> None:
        self._queue = queue
        self._store = store
        self._owners = owners

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return the coroutines that run as long as the gateway."""
        return [self.run, lambda: report_queue_metrics(self._queue, [EVENTS])]

    async def run(self) -> None:
        await retry_while_redis_is_away(lambda: self._queue.open([EVENTS]))
        while True:
            delivery = await retry_while_redis_is_away(lambda: self._queue.receive([EVENTS]))
            if delivery:
                await self._handle(delivery)

    async def _handle(self, delivery: Delivery) -> None:
        event = work_pb2.Event()
        if delivery.count > MAX_DELIVERIES:
            await retry_while_redis_is_away(lambda: self._queue.give_up(delivery, delivery.last_error))
            return
        try:
            delivery.decode(event)
            with _traced(event, delivery):
                await self._when_possible(self._record, event, delivery)
                await self._when_possible(self._apply_event, event, delivery)
        except NotFound:
            telemetry.log().warning("event_without_subject", subject=event.subject)
        except DefuseError as error:
            telemetry.log().warning("event_refused", error=error.message)
            await asyncio.sleep(RETRY_S)
            return  # not acknowledged: it is delivered again
        await retry_while_redis_is_away(lambda: self._queue.acknowledge(delivery))

    async def _when_possible(self, act: ApplyEvent, event: work_pb2.Event, delivery: Delivery) -> None:
        """Store or apply an event, and retry while a dependency fails.

        It retries while Redis or the store is unavailable, or the store is full.
        """
        while True:
            try:
                await retry_while_redis_is_away(lambda: act(event))
            except (Unavailable, StoreFull, OSError) as error:
                telemetry.log().warning("event_retried", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
                await retry_while_redis_is_away(lambda: self._queue.heartbeat(delivery))
            else:
                return

    async def _record(self, event: work_pb2.Event) -> None:
        """Write an event to the store, once.

        Progress events are not stored.
        """
        key = _event_key(event)
        if key and not await asyncio.to_thread(self._store.exists, key):
            await asyncio.to_thread(self._store.write_message, key, event)

    async def _apply_event(self, event: work_pb2.Event) -> None:
        apply_event = self._owners.get(_collection(event))
        if apply_event is None:
            raise NotFound(f"nothing here is called {event.subject!r}", reason="UNKNOWN_SUBJECT")
        await apply_event(event)


def _traced(event: work_pb2.Event, delivery: Delivery) -> AbstractContextManager[None]:
    """Return a span for an event that has consequences.

    Progress events have none, and are too many to trace.
    """
    kind = event.WhichOneof("kind")
    if kind in {None, "progress"}:
        return nullcontext()
    return tracing.message_span("event", delivery.trace, subject=event.subject, kind=kind)


def _collection(event: work_pb2.Event) -> str:
    """Return the collection of a subject: `corrections` for `runs/a/corrections/c1`."""
    return names.last(event.subject.rpartition("/")[0])


def _event_key(event: work_pb2.Event) -> str | None:
    kind = event.WhichOneof("kind")
    if kind == "progress" or not event.subject or _collection(event) == _UNRECORDED:
        return None
    return keys.event(event.subject, f"{kind}{_occurrence(event)}")


def _occurrence(event: work_pb2.Event) -> str:
    """Return a key part that distinguishes events of one kind."""
    if event.HasField("shard_identified"):
        return f"-{event.shard_identified.round:03d}-{event.shard_identified.shard:05d}"
    if event.HasField("round_planned"):
        return f"-{event.round_planned.round:03d}"
    if event.HasField("trained"):
        return f"-{event.trained.position:03d}"
    return ""
