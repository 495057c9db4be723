"""The guarantees of the queue, on a real Redis."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

from defuse.errors import CODES, InvalidInput, Unavailable
from defuse.v1 import work_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_trace_id
from prometheus_client import REGISTRY

from services.runtime import telemetry
from services.runtime.queue import EVENTS, GROUP, MAX_DELIVERIES, PREPARE, Delivery, Queue, StreamState, dead_letters
from services.runtime.worker import Job, Stage, Worker, cancel_key, report_queue_metrics
from tests.conftest import ROOT
from tests.queues import close_queues

Work = work_pb2.PrepareWork
IDLE_S, LONG_S = 0.05, 600.0
EMPTY = StreamState(backlog=0, pending=0, dead=0, oldest_s=0.0)


def work(name: str) -> Work:
    return Work(run={"name": f"runs/{name}"})


def name_of(delivery: Delivery) -> str:
    message = Work()
    delivery.decode(message)
    return message.run.name


def dead_letters_command(url: str, *arguments: str) -> str:
    """Return what an operator is shown."""
    command = [sys.executable, "-m", "services.runtime.dead_letters", *arguments]
    environment = {**os.environ, "DEFUSE_REDIS_URL": url}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def story(url: str, tell: Callable[[Queue, Queue], Awaitable[None]], *, idle_s: float = IDLE_S) -> None:
    """Tell a story of two workers of one group."""

    async def run() -> None:
        queues = [Queue(url, claim_after_s=idle_s) for _ in range(2)]
        for queue in queues:
            await queue.open([PREPARE, EVENTS])
        try:
            await tell(*queues)
        finally:
            await close_queues(*queues)

    asyncio.run(run())


async def next_of(queue: Queue, stream: str = PREPARE) -> Delivery:
    async with asyncio.timeout(60):
        while True:
            if delivery := await queue.receive([stream], block_ms=20):
                return delivery


async def grow_idle(queue: Queue, held: Delivery, seconds: float) -> None:
    """Set the idle time of a delivered message in Redis."""
    idle = round(1000 * seconds)
    await queue.redis.xclaim(held.stream, GROUP, queue.consumer, 0, [held.id], idle=idle, justid=True)


def test_each_message_goes_to_one_worker(redis_url: str) -> None:
    """Two workers share a stream; acknowledged messages are deleted from it."""

    async def tell(one: Queue, other: Queue) -> None:
        await one.send(PREPARE, work("a"))
        await one.send(PREPARE, work("b"))
        first, second = await next_of(one), await next_of(other)
        assert {name_of(first), name_of(second)} == {"runs/a", "runs/b"}
        await one.acknowledge(first)
        await other.acknowledge(second)
        assert await one.state(PREPARE) == EMPTY

    story(redis_url, tell, idle_s=60)


def test_the_message_of_a_dead_worker_is_taken_over(redis_url: str) -> None:
    """Without heartbeats a message comes to another worker, counted; with them it does not."""

    async def tell(one: Queue, other: Queue) -> None:
        await one.send(PREPARE, work("a"))
        held = await next_of(one)
        for _ in range(5):
            await grow_idle(one, held, LONG_S)
            await one.heartbeat(held)
            assert await other.receive([PREPARE], block_ms=1) is None
        await grow_idle(one, held, LONG_S)
        taken = await next_of(other)
        assert (name_of(taken), taken.count, taken.id) == ("runs/a", 2, held.id)

    story(redis_url, tell, idle_s=LONG_S)


def test_a_message_keeps_its_trace(redis_url: str) -> None:
    """For any worker that reclaims it, and also after its replay from the dead letters."""

    async def tell(one: Queue, other: Queue) -> None:
        with TracerProvider().get_tracer("test").start_as_current_span("caller") as caller:
            await one.send(PREPARE, work("a"))
        trace = format_trace_id(caller.get_span_context().trace_id)
        await next_of(one)
        taken = await next_of(other)
        assert taken.count == 2
        assert trace in taken.trace["traceparent"]
        await other.give_up(taken, "planted")
        await other.replay(PREPARE)
        assert trace in (await next_of(one)).trace["traceparent"]

    story(redis_url, tell)


def test_what_follows_is_sent_with_the_acknowledgement(redis_url: str) -> None:
    """The event of a finished message is on its stream when the message is gone."""

    async def tell(one: Queue, other: Queue) -> None:
        await one.send(PREPARE, work("a"))
        event = work_pb2.Event(subject="runs/a", prepared={"source_count": 3})
        await one.acknowledge(await next_of(one), then=(EVENTS, event))
        read = work_pb2.Event()
        (await next_of(other, EVENTS)).decode(read)
        assert read == event

    story(redis_url, tell)


def handled(url: str, handle: Callable[[Work, Job], work_pb2.Event], until: Callable[[Queue], Awaitable[bool]]) -> None:
    """Run a worker on one message until a condition holds."""

    async def tell(queue: Queue, observer: Queue) -> None:
        stage = Stage(kind=Work, subject=lambda message: message.run.name, handle=handle)
        task = asyncio.create_task(Worker(queue, {PREPARE: stage}).run())
        await observer.send(PREPARE, work("a"))
        try:
            async with asyncio.timeout(60):
                while not await until(observer):
                    await asyncio.sleep(0.02)
        finally:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.5)

    story(url, tell)


async def failure_of(queue: Queue) -> str:
    """Return why the subject failed; nothing while it did not."""
    for _, values in await queue.redis.xrange(EVENTS):
        event = work_pb2.Event.FromString(values[b"payload"])
        if event.HasField("failed"):
            return event.failed.error
    return ""


def test_what_waits_is_measured(redis_url: str) -> None:
    """Backlog, what is in hand, and the age of the oldest message, whatever the workers do meanwhile."""

    def measured(name: str) -> float | None:
        return REGISTRY.get_sample_value(f"defuse_queue_{name}", {"stream": PREPARE})

    async def tell(one: Queue, _: Queue) -> None:
        for name in ("a", "b"):
            await one.send(PREPARE, work(name))
        await next_of(one)
        await asyncio.sleep(0.2)
        telemetry.BACKLOG.labels(PREPARE).set(-1)
        measuring = asyncio.create_task(report_queue_metrics(one, [PREPARE]))
        async with asyncio.timeout(60):
            while measured("oldest_seconds") in {None, 0} or measured("backlog") == -1:
                await asyncio.sleep(0.01)
        measuring.cancel()
        assert [measured(name) for name in ("backlog", "pending", "dead")] == [2, 1, 0]
        assert 0.1 < (measured("oldest_seconds") or 0) < 60

    story(redis_url, tell)


def test_a_poisoned_message_becomes_a_dead_letter(redis_url: str) -> None:
    """After five deliveries that ended in a defect the subject fails with the last error; the letter is replayed."""
    tried = []

    def handle(_: Work, __: Job) -> work_pb2.Event:
        tried.append(1)
        raise ZeroDivisionError("planted")

    async def until(queue: Queue) -> bool:
        return bool(await failure_of(queue))

    handled(redis_url, handle, until)
    assert len(tried) == MAX_DELIVERIES

    async def replayed(one: Queue, _: Queue) -> None:
        [(_id, letter)] = await one.redis.xrange(dead_letters(PREPARE))
        assert b"planted" in letter[b"error"]
        assert "planted" in await failure_of(one)
        assert "prepare" in dead_letters_command(redis_url)
        assert dead_letters_command(redis_url, "replay", "prepare") == "1 put back on prepare\n"
        assert dead_letters_command(redis_url) == ""
        assert name_of(await next_of(one)) == "runs/a"

    story(redis_url, replayed)


def test_a_refusal_is_not_tried_again(redis_url: str) -> None:
    """An error that says what the caller must change ends the subject at once, with what it was."""
    tried = []

    def handle(_: Work, __: Job) -> work_pb2.Event:
        tried.append(1)
        raise InvalidInput("change this")

    failed: list[work_pb2.StageFailed] = []

    async def until(queue: Queue) -> bool:
        entries = [values[b"payload"] for _, values in await queue.redis.xrange(EVENTS)]
        failed[:] = [work_pb2.Event.FromString(payload).failed for payload in entries]
        return bool(failed)

    handled(redis_url, handle, until)
    assert len(tried) == 1
    code, _ = CODES[InvalidInput].value
    assert failed == [work_pb2.StageFailed(error="change this", reason="INVALID_INPUT", code=code)]


def test_a_server_that_is_away_is_waited_for(redis_url: str) -> None:
    """While Triton is away the work waits, says so, and goes on, without using up its deliveries."""
    tried = []

    def handle(message: Work, _: Job) -> work_pb2.Event:
        tried.append(1)
        if len(tried) == 1:
            raise Unavailable("Triton is away")
        return work_pb2.Event(subject=message.run.name, prepared={"source_count": 1})

    async def until(queue: Queue) -> bool:
        entries = await queue.redis.xrange(EVENTS)
        events = [work_pb2.Event.FromString(values[b"payload"]) for _, values in entries]
        return [event.WhichOneof("kind") for event in events] == ["progress", "prepared"] and bool(
            "Triton is away" in events[0].progress.note
        )

    handled(redis_url, handle, until)


def test_a_cancelled_job_is_told(redis_url: str) -> None:
    """A handler learns that its subject was cancelled; its message is then gone, without a word."""

    def handle(_: Work, job: Job) -> work_pb2.Event:
        while True:
            job.check_cancelled()

    async def until(queue: Queue) -> bool:
        await queue.redis.set(cancel_key("runs/a"), "1")
        return await queue.state(PREPARE) == EMPTY

    handled(redis_url, handle, until)
