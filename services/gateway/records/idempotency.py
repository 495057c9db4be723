"""Idempotent requests (AIP-155): a retry returns the first response.

A request's effect and answer are kept for a day. The record that a request creates is written in one transaction with a
mark of the request, so a gateway that dies in between leaves both or neither. Services that create something elsewhere
receive the request id, and do not create it twice.
"""

import asyncio
import functools
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from defuse import names
from defuse.errors import AlreadyExists, Conflict
from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.message import Message

from services.runtime.queue import KEY, REDIS_AWAY, Queue

_KEY = f"{KEY}request:"
_KEPT_S = 24 * 3600
# A request whose owner is silent for this long is carried out by another gateway.
LEASE_S = 15.0
_POLL_S = 0.2

A = TypeVar("A", bound=Message)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A request that this gateway carries out."""

    request_id: str
    holder: str

    @property
    def key(self) -> str:
        """Return the Redis key of the request's state.

        The state has the request's digest, the record that it created, and its answer.
        """
        return f"{_KEY}{self.request_id}"

    @property
    def held_key(self) -> str:
        return f"{self.key}:held"

    async def check(self, redis: Any) -> None:
        """Raise Conflict when another gateway took the request over.

        Another gateway does so when this one has not renewed its lease for a long time.
        """
        if await redis.get(self.held_key) != self.holder.encode():
            raise Conflict(f"request {self.request_id!r} is carried out elsewhere; ask again", reason="REQUEST_TAKEN")

    def note(self, pipe: Any, record: Message) -> None:
        """Add the mark of this request to a record's transaction."""
        made = Any_()
        made.Pack(record)
        pipe.hset(self.key, "made", made.SerializeToString())


# The request under way, when it has an id.
claimed: ContextVar[Claim | None] = ContextVar("claimed", default=None)


def idempotent(method: F) -> F:
    """Make a servicer's method idempotent for each `request_id`.

    The servicer has an attribute `requests`.
    """
    kind: type[Message] = method.__annotations__["return"]

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> Any:
        carry_out = functools.partial(method, self, request, context)
        return await self.requests.answer(request, kind, carry_out) if request.request_id else await carry_out()

    return cast("F", call)


class IdempotentRequests:
    """Carries out requests with an id once, over all gateways."""

    def __init__(self, queue: Queue) -> None:
        self._redis = queue.redis

    async def answer(self, request: Any, kind: type[A], carry_out: Callable[[], Awaitable[A]]) -> A:
        """Return the answer to a request, carried out now or before.

        A request that failed is carried out again. Raises AlreadyExists when another request used the id.
        """
        claim = Claim(request_id=names.check_id("request", request.request_id), holder=uuid.uuid4().hex)
        digest = _digest(request)
        while True:
            if answer := _answer(await self._known(claim, digest), kind):
                return answer
            if await self._redis.set(claim.held_key, claim.holder, nx=True, px=round(1000 * LEASE_S)):
                async with self._renew_lease(claim):
                    return await self._execute(claim, digest, kind, carry_out)
            await asyncio.sleep(_POLL_S)  # another gateway carries it out

    async def _execute(self, claim: Claim, digest: bytes, kind: type[A], carry_out: Callable[[], Awaitable[A]]) -> A:
        known = await self._known(claim, digest)
        answer = _answer(known, kind) or _of_record(known, kind)
        await self._keep(claim, "request", digest)
        if not answer:
            token = claimed.set(claim)
            try:
                answer = await carry_out()
            except REDIS_AWAY:
                # Redis may have written the record without answering, so the mark must stay.
                raise
            except Exception:
                await self._forget(claim)
                raise
            finally:
                claimed.reset(token)
        await self._keep(claim, "answer", answer.SerializeToString())
        return answer

    async def _known(self, claim: Claim, digest: bytes) -> dict[bytes, bytes]:
        known: dict[bytes, bytes] = await self._redis.hgetall(claim.key)
        if known.get(b"request", digest) != digest:
            raise AlreadyExists(
                f"request id {claim.request_id!r} was used for another request; choose a new one for each request",
                reason="REQUEST_ID_USED",
            )
        return known

    async def _keep(self, claim: Claim, what: str, content: bytes) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(claim.key, what, content)
            pipe.expire(claim.key, _KEPT_S)
            await pipe.execute()

    async def _forget(self, claim: Claim) -> None:
        with suppress(*REDIS_AWAY, Conflict):
            await claim.check(self._redis)
            await self._redis.delete(claim.key)

    @asynccontextmanager
    async def _renew_lease(self, claim: Claim) -> AsyncIterator[None]:
        """Renew a request's lease while the block runs, then release it."""
        living = asyncio.create_task(self._live(claim))
        try:
            yield
        finally:
            living.cancel()
            with suppress(*REDIS_AWAY, Conflict):
                await claim.check(self._redis)
                await self._redis.delete(claim.held_key)

    async def _live(self, claim: Claim) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 5)
            with suppress(*REDIS_AWAY, Conflict):
                await claim.check(self._redis)
                await self._redis.pexpire(claim.held_key, round(1000 * LEASE_S))


def _digest(request: Message) -> bytes:
    content = request.DESCRIPTOR.full_name.encode() + b"|" + request.SerializeToString(deterministic=True)
    return hashlib.sha256(content).digest()


def _answer(known: dict[bytes, bytes], kind: type[A]) -> A | None:
    return kind.FromString(known[b"answer"]) if b"answer" in known else None


def _of_record(known: dict[bytes, bytes], kind: type[A]) -> A | None:
    """Return the answer that a written record implies, or None.

    A gateway that died after it wrote the record leaves it without an answer.
    """
    made = Any_.FromString(known.get(b"made", b""))
    fields: Any = kind.DESCRIPTOR.fields
    for field in fields:
        if field.message_type and made.Is(field.message_type):
            answer = kind()
            made.Unpack(getattr(answer, field.name))
            return answer
    return None
