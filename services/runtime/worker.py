"""The worker, which turns messages into stored effects.

It does one heavy job at a time, outside the event loop.

The exception of a handler decides what happens to its message:
- Unavailable, StoreFull: an operator must act; the worker reports it, waits, and
  retries;
- Cancelled: the message is acknowledged;
- any other DefuseError: a retry would fail again; the subject fails with the error's
  message;
- anything else: a defect or a poisoned message; it is delivered five times in all,
  then it becomes a dead letter.
"""

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import redis.exceptions
import structlog
from defuse.errors import Cancelled, DefuseError, Internal, StoreFull, Unavailable, to_status
from defuse.v1 import run_pb2, work_pb2
from google.protobuf.message import Message

from services.runtime import telemetry, tracing
from services.runtime.queue import EVENTS, KEY, MAX_DELIVERIES, REDIS_AWAY, Delivery, Queue

RETRY_S = 2.0
MEASURE_EVERY_S = 5.0
# How long a cancellation of a run or correction is remembered.
CANCEL_MARK_S = 7 * 24 * 3600
W = TypeVar("W", bound=Message)
T = TypeVar("T")


class Job:
    """The progress and cancellation of a message, for its handler.

    The handler runs in a thread.
    """

    def __init__(self, subject: str, publish: Callable[[work_pb2.Event], None]) -> None:
        self.subject = subject
        self._publish = publish
        self._cancelled = threading.Event()

    def progress(
        self,
        fraction: float,
        note: str,
        *,
        state: "run_pb2.Run.State.ValueType" = 0,  # type: ignore[assignment]  # 0 is unset
        training: int | None = None,
    ) -> None:
        """Report progress to the gateway.

        A lost report does no harm.
        """
        step = work_pb2.StageProgress(state=state, progress=fraction, note=note, training=training)
        self._publish(work_pb2.Event(subject=self.subject, progress=step))

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check_cancelled(self) -> None:
        """Raise Cancelled when the job was cancelled."""
        if self.cancelled():
            raise Cancelled(f"{self.subject} was cancelled")

    def cancel(self) -> None:
        self._cancelled.set()


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[W]):
    """The type and the handler of one stream's messages."""

    kind: type[W]
    # Name of the run or correction that a message belongs to.
    subject: Callable[[W], str]
    # Does the work, stores its effect, returns the event about it. Idempotent.
    handle: Callable[[W, Job], work_pb2.Event]
    # Fields of a message for logs and traces, beside its subject, such as its shard.
    details: Callable[[W], Mapping[str, Any]] = lambda _: {}


async def retry_while_redis_is_away(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call to Redis, and retry it while Redis is unavailable."""
    while True:
        try:
            return await call()
        except REDIS_AWAY as error:
            telemetry.log().warning("redis_away", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)


class Worker:
    """Handles the messages of some stages, one at a time."""

    def __init__(self, queue: Queue, stages: Mapping[str, Stage[Any]]) -> None:
        self._queue = queue
        self._stages = stages

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return the coroutines that run as long as the service."""
        return [self.run, lambda: report_queue_metrics(self._queue, self._stages.keys())]

    async def run(self) -> None:
        """Handle messages until the task is cancelled.

        A claimed message then stays pending, and another worker reclaims it.
        """
        streams = list(self._stages)
        await retry_while_redis_is_away(lambda: self._queue.open(streams))
        while True:
            delivery = await retry_while_redis_is_away(lambda: self._queue.receive(streams))
            if delivery:
                await self._work(delivery)

    async def _work(self, delivery: Delivery) -> None:
        stage = self._stages[delivery.stream]
        work = stage.kind()
        try:
            delivery.decode(work)
        except DefuseError as error:
            telemetry.MESSAGES.labels(delivery.stream, "dead").inc()
            give_up = functools.partial(self._queue.give_up, delivery, error.message, then=_failed("", error))
            await retry_while_redis_is_away(give_up)
            return
        subject = stage.subject(work)
        about = {"subject": subject, "message": delivery.id, "stream": delivery.stream, **stage.details(work)}
        with (
            structlog.contextvars.bound_contextvars(**about),
            tracing.message_span(delivery.stream.rpartition(":")[2], delivery.trace, **about),
        ):
            if delivery.count > MAX_DELIVERIES:
                await self._dead_letter(delivery, subject)
                return
            with telemetry.MESSAGE_SECONDS.labels(delivery.stream).time():
                outcome = await self._handle(stage, work, delivery, subject)
            tracing.set_outcome(outcome, failed=outcome in {"failed", "raised"})
            telemetry.MESSAGES.labels(delivery.stream, outcome).inc()
            telemetry.log().info("message_handled", outcome=outcome, delivery=delivery.count)

    async def _handle(self, stage: Stage[Any], work: Message, delivery: Delivery, subject: str) -> str:
        loop = asyncio.get_running_loop()
        job = Job(subject, lambda event: self._publish_from_thread(loop, event))
        over = asyncio.Event()
        heartbeat = asyncio.create_task(self._heartbeat(delivery, job, over))
        try:
            event = await self._handle_while_servers_are_away(stage, work, job)
        except Cancelled:
            await retry_while_redis_is_away(lambda: self._queue.acknowledge(delivery))
            return "cancelled"
        except DefuseError as error:
            telemetry.log().warning("stage_failed", error=error.message, reason=error.reason)
            failed = _failed(subject, error)
            await retry_while_redis_is_away(lambda: self._queue.acknowledge(delivery, then=failed))
            return "failed"
        except asyncio.CancelledError:
            job.cancel()  # the process is stopping: the thread ends soon, the message stays pending
            raise
        except Exception as error:  # noqa: BLE001  # a defect: kept beside the message, which comes again
            telemetry.log().exception("handler_raised", delivery=delivery.count)
            text = f"{type(error).__name__}: {error}"
            await retry_while_redis_is_away(lambda: self._queue.note_error(delivery, text))
            return "raised"
        finally:
            # Not cancelled: when the Redis client swallows a cancellation, the claim would be renewed without end.
            over.set()
            await asyncio.wait([heartbeat])
        await retry_while_redis_is_away(lambda: self._queue.acknowledge(delivery, then=(EVENTS, event)))
        return "done"

    async def _handle_while_servers_are_away(self, stage: Stage[Any], work: Message, job: Job) -> work_pb2.Event:
        while True:
            try:
                return await asyncio.to_thread(stage.handle, work, job)
            except (Unavailable, StoreFull) as error:
                telemetry.log().warning("stage_waiting", error=error.message, retry_s=RETRY_S)
                await self._publish(
                    work_pb2.Event(
                        subject=job.subject, progress=work_pb2.StageProgress(note=f"waiting: {error.message}")
                    )
                )
                await asyncio.sleep(RETRY_S)
                job.check_cancelled()

    async def _heartbeat(self, delivery: Delivery, job: Job, over: asyncio.Event) -> None:
        while not over.is_set():
            with suppress(*REDIS_AWAY):
                await self._queue.heartbeat(delivery)
                if await self._queue.redis.exists(cancel_key(job.subject)):
                    job.cancel()
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), min(1.0, self._queue.claim_after_s / 3))

    async def _dead_letter(self, delivery: Delivery, subject: str) -> None:
        error = f"given up after {MAX_DELIVERIES} deliveries; the last error was: {delivery.last_error}"
        telemetry.log().error("dead_letter", error=error)
        telemetry.MESSAGES.labels(delivery.stream, "dead").inc()
        await retry_while_redis_is_away(
            lambda: self._queue.give_up(delivery, error, then=_failed(subject, Internal(error)))
        )

    async def _publish(self, event: work_pb2.Event) -> None:
        with suppress(*REDIS_AWAY):
            await self._queue.send(EVENTS, event)

    def _publish_from_thread(self, loop: asyncio.AbstractEventLoop, event: work_pb2.Event) -> None:
        asyncio.run_coroutine_threadsafe(self._publish(event), loop)


async def report_queue_metrics(queue: Queue, streams: Collection[str]) -> None:
    """Update the metrics of streams until the task is cancelled."""
    while True:
        for stream in streams:
            with suppress(*REDIS_AWAY, redis.exceptions.ResponseError):
                # Suppressed: Redis is away, or the group is about to be created.
                state = await queue.state(stream)
                telemetry.BACKLOG.labels(stream).set(state.backlog)
                telemetry.PENDING.labels(stream).set(state.pending)
                telemetry.DEAD.labels(stream).set(state.dead)
                telemetry.OLDEST.labels(stream).set(state.oldest_s)
        await asyncio.sleep(MEASURE_EVERY_S)


def cancel_key(subject: str) -> str:
    """Return the Redis key that cancels a run or correction."""
    return f"{KEY}cancelled:{subject}"


def _failed(subject: str, error: DefuseError) -> tuple[str, work_pb2.Event]:
    failed = work_pb2.StageFailed(error=error.message, reason=error.reason, code=to_status(error).code)
    return EVENTS, work_pb2.Event(subject=subject, failed=failed)
