"""Queues on Redis Streams with at-least-once delivery.

Each stage has one stream, and each stream one consumer group. A message stays on its stream until it is acknowledged,
and is deleted with the acknowledgement: a stream holds exactly the unfinished messages, so nothing unacknowledged can
be trimmed. A worker renews its claim with heartbeats, and a message without them is reclaimed by a living worker. After
`MAX_DELIVERIES` deliveries a message moves to the stream's dead letters with its last error, and can be replayed from
there.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio
import redis.exceptions
from defuse.errors import Internal, Unavailable
from google.protobuf.message import DecodeError, Message
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.runtime import tracing

# Prefix of every Redis key of Defuse.
KEY = "defuse:"
PREPARE, PLAN, IDENTIFY, DISTILL, WATCH, TRAIN, CHOOSE, PUBLISH, EVENTS = (
    f"{KEY}stream:{stage}"
    for stage in ("prepare", "plan", "identify", "distill", "watch", "train", "choose", "publish", "events")
)
GROUP = "workers"
MAX_DELIVERIES = 5
SCHEMA = 1
# Fields of a message for W3C Trace Context.
TRACE_FIELDS = ("traceparent", "tracestate")
# Exceptions of redis-py while a server is away, starting, or shutting down.
REDIS_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, redis.exceptions.ReadOnlyError)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A message that this worker has claimed."""

    stream: str
    id: str
    payload: bytes
    schema: int
    # Number of deliveries, including this one.
    count: int
    # Error of the last worker that failed on it.
    last_error: str
    # Trace context of the message.
    trace: Mapping[str, str]

    def decode(self, message: Message) -> None:
        """Parse the payload into `message`.

        Raises Internal for another schema or an invalid protobuf.
        """
        if self.schema != SCHEMA:
            raise Internal(f"message {self.id} has schema {self.schema}, this service reads {SCHEMA}; upgrade together")
        try:
            message.ParseFromString(self.payload)
        except DecodeError as error:
            raise Internal(f"message {self.id} of {self.stream} is no {message.DESCRIPTOR.name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """The numbers of a stream's messages, and the age of the oldest.

    Unfinished, claimed and dead messages are counted.
    """

    backlog: int
    pending: int
    dead: int
    oldest_s: float


class Queue:
    """Sends and receives messages on the streams of one Redis server."""

    def __init__(self, url: str, *, claim_after_s: float = 15.0, timeout_s: float = 5.0) -> None:
        self.url = url
        self.claim_after_s = claim_after_s
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        # No retries inside the client: callers decide what is retried.
        self.redis: Any = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s + 1.0,
            retry=Retry(NoBackoff(), 0),
        )

    async def check(self) -> None:
        """Raise Unavailable unless Redis answers."""
        try:
            await self.redis.ping()
        except REDIS_AWAY as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(
            f"Redis at {self.url} does not answer ({error}); start it or set DEFUSE_REDIS_URL",
            reason="REDIS_UNAVAILABLE",
        )

    async def send(self, stream: str, message: Message) -> None:
        await self.redis.xadd(stream, entry_fields(message))

    async def open(self, streams: Iterable[str]) -> None:
        """Create the streams and groups that are missing."""
        for stream in streams:
            try:
                await self.redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except redis.exceptions.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def receive(self, streams: Sequence[str], *, block_ms: int = 1000) -> Delivery | None:
        """Return one message, reclaimed ones first.

        Returns None when none arrives within `block_ms` milliseconds.
        """
        try:
            return await self._reclaim(streams) or await self._read_new(streams, block_ms)
        except redis.exceptions.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.open(streams)  # Redis lost its data
            return None

    async def heartbeat(self, delivery: Delivery) -> None:
        """Renew the claim on a message."""
        await self.redis.xclaim(delivery.stream, GROUP, self.consumer, 0, [delivery.id], justid=True)

    async def acknowledge(self, delivery: Delivery, *, then: tuple[str, Message] | None = None) -> None:
        """Delete a message whose effect is stored, and send its follow-up.

        Both happen in one transaction.
        """
        async with self.redis.pipeline(transaction=True) as pipe:
            if then:
                pipe.xadd(then[0], entry_fields(then[1]))
            _remove(pipe, delivery)
            await pipe.execute()

    async def give_up(self, delivery: Delivery, error: str, *, then: tuple[str, Message] | None = None) -> None:
        """Move a message to the dead letters, and send its follow-up.

        Both happen in one transaction.
        """
        async with self.redis.pipeline(transaction=True) as pipe:
            letter = {"payload": delivery.payload, "schema": delivery.schema, "error": error, "id": delivery.id}
            letter |= delivery.trace
            pipe.xadd(dead_letters(delivery.stream), letter)
            if then:
                pipe.xadd(then[0], entry_fields(then[1]))
            _remove(pipe, delivery)
            await pipe.execute()

    async def note_error(self, delivery: Delivery, error: str) -> None:
        """Store the error of a message that will be delivered again."""
        await self.redis.hset(_errors(delivery.stream), delivery.id, error)

    async def dead(self, stream: str) -> list[tuple[str, str]]:
        """Return the ids and errors of a stream's dead letters, oldest first."""
        letters = await self.redis.xrange(dead_letters(stream))
        return [(letter_id.decode(), letter[b"error"].decode()) for letter_id, letter in letters]

    async def replay(self, stream: str) -> int:
        """Move all dead letters of a stream back to it.

        Returns their number.
        """
        letters = await self.redis.xrange(dead_letters(stream))
        for letter_id, letter in letters:
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.xadd(stream, {name: value for name, value in letter.items() if name not in {b"error", b"id"}})
                pipe.xdel(dead_letters(stream), letter_id)
                await pipe.execute()
        return len(letters)

    async def state(self, stream: str) -> StreamState:
        pending = await self.redis.xpending(stream, GROUP)
        oldest = await self.redis.xrange(stream, count=1)
        return StreamState(
            backlog=await self.redis.xlen(stream),
            pending=pending["pending"],
            dead=await self.redis.xlen(dead_letters(stream)),
            oldest_s=time.time() - int(oldest[0][0].partition(b"-")[0]) / 1000 if oldest else 0.0,
        )

    async def close(self) -> None:
        await self.redis.aclose()

    async def _read_new(self, streams: Sequence[str], block_ms: int) -> Delivery | None:
        # One stream after the other, so that this worker never claims more than one message; then all at once, where
        # the message that arrives is left for the next call.
        for stream in streams:
            answer = await self.redis.xreadgroup(GROUP, self.consumer, {stream: ">"}, count=1)
            if answer:
                [(_, [(message_id, values)])] = answer
                return _delivery(stream, message_id, values)
        await self.redis.xread(dict.fromkeys(streams, "$"), count=1, block=block_ms)
        return None

    async def _reclaim(self, streams: Sequence[str]) -> Delivery | None:
        for stream in streams:
            idle_ms = int(self.claim_after_s * 1000)
            answer = await self.redis.xautoclaim(stream, GROUP, self.consumer, idle_ms, count=1)
            for message_id, values in answer[1]:
                if values:  # None for a message that was deleted while pending
                    return await self._with_delivery_count(_delivery(stream, message_id, values))
        return None

    async def _with_delivery_count(self, delivery: Delivery) -> Delivery:
        [entry] = await self.redis.xpending_range(delivery.stream, GROUP, delivery.id, delivery.id, 1)
        error = await self.redis.hget(_errors(delivery.stream), delivery.id)
        return Delivery(
            stream=delivery.stream,
            id=delivery.id,
            payload=delivery.payload,
            schema=delivery.schema,
            count=entry["times_delivered"],
            last_error=(error or b"the worker died").decode(),
            trace=delivery.trace,
        )


def entry_fields(message: Message) -> dict[Any, Any]:
    """Return the stream entry of a message."""
    return {
        "payload": message.SerializeToString(deterministic=True),
        "schema": SCHEMA,
        **tracing.current_trace_context(),
    }


def dead_letters(stream: str) -> str:
    return f"{stream}:dead"


def _errors(stream: str) -> str:
    return f"{stream}:errors"


def _remove(pipe: Any, delivery: Delivery) -> None:
    pipe.xack(delivery.stream, GROUP, delivery.id)
    pipe.xdel(delivery.stream, delivery.id)
    pipe.hdel(_errors(delivery.stream), delivery.id)


def _delivery(stream: str, message_id: bytes, values: dict[bytes, bytes]) -> Delivery:
    return Delivery(
        stream=stream,
        id=message_id.decode(),
        payload=values.get(b"payload", b""),
        schema=int(values.get(b"schema", b"0")),
        count=1,
        last_error="",
        trace={name: values[name.encode()].decode() for name in TRACE_FIELDS if name.encode() in values},
    )
