"""Halves of observations that wait for each other, in Redis: they may come to different gateways, in either order."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from defuse.v1 import monitor_pb2

from services.gateway.monitoring.payloads import REQUEST, RESPONSE
from services.runtime.queue import KEY, Queue

# How long a half waits for the other one, how many may wait, and of how many bytes; the oldest are given up first. Then
# how many pairs are stored at once.
LONGEST_WAIT_S = 600
MOST_WAITING = 10_000
MOST_BYTES = 256 << 20
MOST_AT_ONCE = 200
_WAITING, _WHOLE = f"{KEY}events:waiting", f"{KEY}events:whole"
_MODEL = "model"
_FIELDS_OF_WHOLE = 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What there is of an event's two halves."""

    key: str
    model: str
    halves: dict[str, monitor_pb2.ObservationBatch]

    @property
    def whole(self) -> bool:
        return len(self.halves) == 2

    @property
    def lacks(self) -> str:
        """Name the half that is missing, of a pair that is not whole."""
        return RESPONSE if REQUEST in self.halves else REQUEST


class Halves:
    """Brings halves together."""

    def __init__(self, queue: Queue) -> None:
        self._redis = queue.redis

    async def put(self, model_name: str, event_id: str, half: str, batch: monitor_pb2.ObservationBatch) -> None:
        """Keep a half, unless its pair was settled before."""
        key = _key(model_name, event_id)
        if await self._redis.exists(_settled(key)):
            return
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping={half: batch.SerializeToString(), _MODEL: model_name})
            pipe.zadd(_WAITING, {key: time.time()}, nx=True)
            pipe.hlen(key)
            *_, fields = await pipe.execute()
        # Killed before this, the pair is found by `late`.
        if fields == _FIELDS_OF_WHOLE:
            await self._redis.zadd(_WHOLE, {key: time.time()})

    async def take_whole(self) -> Sequence[Pair]:
        """Return some whole pairs, which no other gateway gets until they are given back, or late."""
        found = await self._redis.zpopmin(_WHOLE, MOST_AT_ONCE)
        pairs = [await self._read(key.decode()) for key, _ in found]
        return [pair for pair in pairs if pair.whole]  # others were settled meanwhile

    async def give_back(self, pairs: Sequence[Pair]) -> None:
        """Let any gateway take whole pairs."""
        if pairs:
            await self._redis.zadd(_WHOLE, {pair.key: time.time() for pair in pairs})

    async def settle(self, pair: Pair) -> bool:
        """Let go of a pair; return whether this gateway did it, of several that may."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(_WAITING, pair.key)
            pipe.delete(pair.key)
            pipe.set(_settled(pair.key), "1", ex=LONGEST_WAIT_S)
            removed, _, _ = await pipe.execute()
        return bool(removed)

    async def late(self) -> Sequence[Pair]:
        """Return pairs that have waited for too long."""
        keys = await self._redis.zrangebyscore(_WAITING, "-inf", time.time() - LONGEST_WAIT_S)
        return [await self._read(key.decode()) for key in keys]

    async def too_many(self, most: int = MOST_WAITING, most_bytes: int = MOST_BYTES) -> Sequence[Pair]:
        """Return the oldest pairs, those without which the rest are few and small enough."""
        keys = await self._redis.zrevrange(_WAITING, 0, -1)
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hstrlen(key, REQUEST)
                pipe.hstrlen(key, RESPONSE)
            sizes = await pipe.execute()
        left, beyond = most_bytes, []
        for number, (key, *of_halves) in enumerate(zip(keys, sizes[::2], sizes[1::2], strict=True)):
            left -= sum(of_halves)
            if number >= most or left < 0:
                beyond.append(await self._read(key.decode()))
        return beyond

    async def _read(self, key: str) -> Pair:
        found = await self._redis.hgetall(key)
        model_name = found.pop(_MODEL.encode(), b"").decode()
        halves = {half.decode(): monitor_pb2.ObservationBatch.FromString(data) for half, data in found.items()}
        return Pair(key=key, model=model_name, halves=halves)


def _key(model_name: str, event_id: str) -> str:
    return f"{KEY}events:{hashlib.sha256(f'{model_name}:{event_id}'.encode()).hexdigest()[:32]}"


def _settled(key: str) -> str:
    return f"{key}:settled"
