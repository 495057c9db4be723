"""The observation index, in Redis, for all gateways.

It has the batch of each observation, the batches being stored and the batches already
enqueued for scoring. The store remains the record: entries of the index refer to it,
and expire once their target has been deleted.
"""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import redis.exceptions
from defuse import names
from defuse.errors import Conflict
from google.protobuf.message import Message

from services.runtime.queue import KEY, WATCH, Queue, entry_fields
from services.storage import keys

# Longer than storing a batch takes: after this time, claims of a dead gateway lapse.
LEASE_S = 60
# Longest work of a deletion on one batch, in seconds.
_LOCK_S = 60
# A batch stays in the store until its hour is past its retention, and until the next deletion run.
_LONGER = timedelta(hours=2)
# Prefixes the batch of a deleted observation.
_DELETED = "-"
_UNFINISHED = f"{KEY}observed:unfinished"

# Claims all observations that are free, or whose batch lost them, or none: when one belongs to a batch that is still
# being stored, nothing is changed or returned. A script, because watching thousands of keys takes Redis quadratic time.
_CLAIM = """
local batch, token, lease_s, now, kept_s, free = unpack(ARGV, 1, 6)
local known = {[batch] = 'free'}
for i = 7, #ARGV do known[ARGV[i]] = i < 7 + free and 'free' or 'taken' end
local own = {}
for i = 3, #KEYS do
    local holder = redis.call('GET', KEYS[i])
    if holder and not known[holder] then return nil end
    if not holder or known[holder] == 'free' then own[#own + 1] = i - 3 end
end
for _, row in ipairs(own) do redis.call('SET', KEYS[row + 3], batch, 'EX', kept_s) end
redis.call('SET', KEYS[1], token, 'EX', lease_s)
redis.call('ZADD', KEYS[2], now, batch)
return own
"""

# Returns whether a batch is in the store.
Exists = Callable[[str], Awaitable[bool]]


class ObservationIndex:
    """Finds, claims and marks observations, for all gateways.

    Batches are named by their keys in the store.
    """

    def __init__(self, queue: Queue, exists: Exists) -> None:
        self._redis = queue.redis
        self._exists = exists
        self._claim = self._redis.register_script(_CLAIM)

    async def place(self, model_name: str, batch_id: str, batch: str, kept: timedelta) -> str:
        """Return the key of the batch with this id.

        It is `batch` unless storing began under another key.
        """
        key = f"{KEY}observed:{names.last(model_name)}:batch:{batch_id}"
        await self._redis.set(key, batch, nx=True, ex=kept + _LONGER)
        found = await self._redis.get(key)
        return found.decode() if found else batch

    async def claim(self, batch: str, ids: Sequence[str], kept: timedelta) -> tuple[str, Sequence[str]]:
        """Claim observations for a batch about to be stored.

        Returns a claim token and the claimed ids. Each observation counts once, so observations of other stored batches
        and deleted ones are not claimed. Raises Conflict while another batch with one of them is being stored.
        """
        record_keys, token = [_id_key(batch, one) for one in ids], uuid.uuid4().hex
        own = None
        while own is None:
            found = await self._redis.mget(record_keys) if record_keys else []
            holders = {holder.decode() for holder in found if holder} - {batch}
            free = [holder for holder in holders if not await self._keeps(holder)]
            own = await self._claim(
                keys=[_lease_key(batch), _UNFINISHED, *record_keys],
                args=[batch, token, LEASE_S, time.time(), _seconds(kept), len(free), *free, *holders.difference(free)],
            )
        return token, [ids[row] for row in own]

    async def check(self, batch: str, token: str) -> None:
        """Raise Conflict when the claim of a storing gateway has lapsed.

        Another gateway may then have claimed the same observations.
        """
        if await self._redis.get(_lease_key(batch)) != token.encode():
            raise Conflict(
                f"batch {names.last(batch)!r} is being stored elsewhere; ask again", reason="BATCH_UNDER_WAY"
            )

    async def enqueue_once(self, batch: str, work: Message, kept: timedelta) -> None:
        """Enqueue the work of a stored batch, unless it was enqueued before."""
        marker = f"{KEY}observed:handed-on:{batch}"
        while True:
            async with self._redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(marker)
                    sent = await pipe.exists(marker)
                    pipe.multi()
                    if not sent:
                        pipe.set(marker, "1", ex=kept + _LONGER)
                        pipe.xadd(WATCH, entry_fields(work))
                    pipe.zrem(_UNFINISHED, batch)
                    await pipe.execute()
                except redis.exceptions.WatchError:
                    continue
                return

    async def abandoned(self) -> Sequence[str]:
        """Return the batches whose storing began long ago and never ended."""
        found = await self._redis.zrangebyscore(_UNFINISHED, "-inf", time.time() - LEASE_S)
        return [batch.decode() for batch in found]

    async def forget(self, batch: str) -> None:
        """Drop an unstored batch, so that it can be reported again."""
        await self._redis.zrem(_UNFINISHED, batch)

    async def find(self, model_name: str, ids: Sequence[str], *, deleted: bool = False) -> dict[str, list[str]]:
        """Return the known ids of observations by batch.

        Deleted observations are left out unless they are requested.
        """
        found: dict[str, list[str]] = {}
        if not ids:
            return found
        holders = await self._redis.mget([_key(names.last(model_name), one) for one in ids])
        for one, holder in zip(ids, holders, strict=True):
            batch = (holder or b"").decode()
            if batch and (deleted or not batch.startswith(_DELETED)):
                found.setdefault(batch.removeprefix(_DELETED), []).append(one)
        return found

    async def mark_deleted(self, batch: str, ids: Sequence[str], kept: timedelta) -> None:
        """Mark observations as deleted, so that no late report restores them."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for one in ids:
                pipe.set(_id_key(batch, one), f"{_DELETED}{batch}", ex=kept + _LONGER)
            await pipe.execute()

    async def deleted_of(self, batch: str, ids: Sequence[str]) -> Sequence[str]:
        """Return the observations of a batch that are marked as deleted."""
        holders = await self._redis.mget([_id_key(batch, one) for one in ids])
        return [one for one, holder in zip(ids, holders, strict=True) if holder == f"{_DELETED}{batch}".encode()]

    async def check_settled(self, batch: str) -> None:
        """Raise Conflict while a batch is still being stored."""
        if await self._redis.exists(_lease_key(batch)) and not await self._exists(batch):
            raise _under_way(batch)

    @asynccontextmanager
    async def alone(self, batch: str) -> AsyncIterator[None]:
        """Lock a stored batch while the block runs.

        Raises Conflict when the lock expired before the block ended.
        """
        try:
            async with self._redis.lock(f"{KEY}observed:lock:{batch}", timeout=_LOCK_S):
                yield
        except redis.exceptions.LockError as error:  # its lock expired before the block ended
            raise Conflict(
                f"work on batch {names.last(batch)!r} took longer than {_LOCK_S} s, and others may have changed it "
                "meanwhile; ask again",
                reason="BATCH_UNDER_WAY",
            ) from error

    async def _keeps(self, holder: str) -> bool:
        """Return whether a batch keeps its observations.

        Raises Conflict while the batch is being stored.
        """
        if holder.startswith(_DELETED) or await self._exists(holder):
            return True
        if await self._redis.exists(_lease_key(holder)):
            raise _under_way(holder)
        return False  # its gateway is dead


def _seconds(kept: timedelta) -> int:
    return int((kept + _LONGER).total_seconds())


def _under_way(batch: str) -> Conflict:
    return Conflict(
        f"batch {names.last(batch)!r}, which has some of these observations, is being stored; ask again",
        reason="BATCH_UNDER_WAY",
    )


def _lease_key(batch: str) -> str:
    return f"{KEY}observed:storing:{batch}"


def _id_key(batch: str, observation_id: str) -> str:
    return _key(names.last(batch.partition("/observations/")[0]), observation_id)


def _key(model_id: str, observation_id: str) -> str:
    return f"{KEY}observed:{model_id}:id:{keys.observation_digest(observation_id).hex()}"
