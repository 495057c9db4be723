"""The record store: records in Redis, changed by compare-and-set.

A change and the work that follows from it are written in one transaction.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import redis.exceptions
from defuse import names
from defuse.errors import AlreadyExists, Conflict, NotFound
from google.protobuf.message import Message

from services.gateway.records.idempotency import claimed
from services.gateway.records.paging import Placed, Position
from services.runtime.queue import KEY, Queue, entry_fields

# How soon a watcher sees a change. Polling works across gateways and reconnects, where a notification could be lost.
_POLL_S = 0.2
# Records of a long list that are read at once.
_AT_ONCE = 100

R = TypeVar("R", bound=Message)
# A queue message and its stream.
Work = tuple[str, Message]


class RecordStore(Generic[R]):
    """Creates, reads and changes all records of one kind."""

    def __init__(self, queue: Queue, kind: type[R], collection: str, ended: Callable[[R], bool]) -> None:
        self._queue = queue
        self._kind = kind
        self._collection = collection
        self._ended = ended

    async def create(self, record: R, works: Sequence[Work], *, lock_key: str | None = None) -> R:
        """Write a new record and enqueue its first work, in one transaction.

        `lock_key` is a key that the record holds until `update` frees it or the record has ended. Raises AlreadyExists
        for a name in use, and Conflict while another record holds the key.
        """
        name, created = _identity(record)
        key, claim = _key(name), claimed.get()
        while True:
            async with self._queue.redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(key, *([lock_key] if lock_key else []), *([claim.held_key] if claim else []))
                    if claim:
                        await claim.check(pipe)
                    if lock_key:
                        await self._check_free(lock_key)
                    if await pipe.exists(key):
                        raise AlreadyExists(
                            f"{name} exists already; choose another name",
                            reason=f"{self._resource_name.upper()}_EXISTS",
                        )
                    pipe.multi()
                    pipe.set(key, record.SerializeToString())
                    pipe.zadd(self._index(names.parent(name)), {name: created})
                    if lock_key:
                        pipe.set(lock_key, name)
                    if claim:
                        claim.note(pipe, record)
                    for stream, message in works:
                        pipe.xadd(stream, entry_fields(message))
                    await pipe.execute()
                except redis.exceptions.WatchError:
                    continue
                return record

    async def get(self, name: str) -> R:
        """Return a record; raise NotFound for an unknown name."""
        data = await self._queue.redis.get(_key(name))
        if data is None:
            raise NotFound(
                f"there is no {self._resource_name} {names.last(name)!r}",
                reason=f"{self._resource_name.upper()}_NOT_FOUND",
            )
        return self._parse(data)

    async def list(self, parent: str = "") -> list[R]:
        """Return the records below a parent, oldest first."""
        found = await self._queue.redis.zrange(self._index(parent), 0, -1)
        if not found:
            return []
        values = await self._queue.redis.mget([_key(name.decode()) for name in found])
        return [self._parse(data) for data in values if data is not None]

    async def iterate_after(
        self, parent: str, position: Position, *, newest_first: bool = False
    ) -> AsyncGenerator[Placed[R], None]:
        """Yield the records of a parent after a position, with their positions.

        An empty position yields all records.
        """
        while records := await self._read_after(parent, position, newest_first=newest_first):
            for placed in records:
                yield placed
            position, _ = records[-1]

    async def update(self, name: str, change: Callable[[R], Sequence[Work]], *, unlock_key: str | None = None) -> R:
        """Change a record and enqueue the resulting work, in one transaction.

        After a concurrent change of the record it calls `change` again. `unlock_key` is a key that is freed when this
        record holds it.
        """
        key = _key(name)
        while True:
            async with self._queue.redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(key, *([unlock_key] if unlock_key else []))
                    record = await self.get(name)
                    holds = unlock_key and await pipe.get(unlock_key) == name.encode()
                    works = change(record)
                    pipe.multi()
                    pipe.set(key, record.SerializeToString())
                    for stream, message in works:
                        pipe.xadd(stream, entry_fields(message))
                    if holds:
                        pipe.delete(unlock_key)
                    await pipe.execute()
                except redis.exceptions.WatchError:
                    continue
                return record

    async def watch(self, name: str) -> AsyncIterator[R]:
        """Yield a record now and whenever it has changed since the last poll.

        It stops when the record has ended.
        """
        last = None
        while True:
            record = await self.get(name)
            if record != last:
                yield record
                last = record
            if self._ended(record):
                return
            await asyncio.sleep(_POLL_S)

    async def _check_free(self, taken: str) -> None:
        holder = await self._queue.redis.get(taken)
        record = None
        if holder:
            with suppress(NotFound):
                record = await self.get(holder.decode())
        if record and not self._ended(record):
            raise Conflict(
                f"{holder.decode()} is under way; wait until it has ended",
                reason=f"{self._resource_name.upper()}_UNDER_WAY",
            )

    async def _read_after(self, parent: str, position: Position, *, newest_first: bool) -> Sequence[Placed[R]]:
        redis_ = self._queue.redis
        ranged, begin, end = redis_.zrangebyscore, "-inf", "+inf"
        if newest_first:
            ranged, begin, end = redis_.zrevrangebyscore, end, begin
        seen = 0
        if position:
            begin, last = position
            # Records of the same moment are sorted by name.
            names_ = [found.decode() for found in await ranged(self._index(parent), begin, begin)]
            seen = sum(name >= last if newest_first else name <= last for name in names_)
        found = await ranged(self._index(parent), begin, end, start=seen, num=_AT_ONCE, withscores=True)
        values = await redis_.mget([_key(name.decode()) for name, _ in found]) if found else []
        return [
            ([created, name.decode()], self._parse(data))
            for (name, created), data in zip(found, values, strict=True)
            if data is not None
        ]

    @property
    def _resource_name(self) -> str:
        return self._collection.removesuffix("s")

    def _parse(self, data: bytes) -> R:
        record = self._kind()
        record.ParseFromString(data)
        return record

    def _index(self, parent: str) -> str:
        return f"{KEY}index:{parent}:{self._collection}"


def _key(name: str) -> str:
    return f"{KEY}record:{name}"


def _identity(record: Any) -> tuple[str, float]:
    return record.name, record.create_time.ToNanoseconds() / 1e9
