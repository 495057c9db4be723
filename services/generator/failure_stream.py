"""The failure stream of a run, which can be resumed anywhere.

Stored failures come in the order of rounds, sources and draws.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

from defuse import names
from defuse.errors import Cancelled, InvalidInput, NotReady
from defuse.v1 import failure_pb2, run_pb2, work_pb2
from defuse.v1 import generator_service_pb2 as pb

from services.generator.run_context import RunContext, is_adaptive
from services.storage import keys

_POLL_S = 0.2
# Bytes of failures in one response; a failure has its latent, the run's name and about 100 bytes more.
_RESPONSE_BYTES = 1 << 20
_FAILURE_BYTES = 128
_TOKEN = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """A position in the stream, after `offset` failures of a shard."""

    round_: int = 0
    shard: int = 0
    offset: int = 0

    def token(self) -> str:
        return f"{self.round_}.{self.shard}.{self.offset}"

    @classmethod
    def of(cls, token: str) -> Self:
        """Return the position of a token; an empty token is the beginning.

        Raises InvalidInput for an invalid token.
        """
        if not token:
            return cls()
        match = _TOKEN.fullmatch(token)
        if not match:
            raise InvalidInput(
                f"{token[:80]!r} is no resume token; give the one of the last response, or none",
                reason="BAD_RESUME_TOKEN",
            )
        round_, shard, offset = map(int, match.groups())
        return cls(round_=round_, shard=shard, offset=offset)


async def stream_failures(
    context: RunContext, run: run_pb2.Run, begin: StreamPosition
) -> AsyncIterator[pb.IdentifyResponse]:
    """Yield the failures of a run as they are stored.

    Raises an error when the run failed or was cancelled.
    """
    await _wait_for_artifact(context, run, keys.sources(run.name))
    size = run.config.search.shard_size
    shards = -(-len((await asyncio.to_thread(context.prepared, run)).index) // size)
    round_, first, offset = begin.round_, begin.shard, begin.offset
    while await _has_round(context, run, round_):
        for shard in range(first, shards):
            await _wait_for_artifact(context, run, keys.shard_result(run.name, round_, shard))
            for response in await asyncio.to_thread(_responses, context, run, round_, shard, offset):
                yield response
            offset = 0
        round_, first = round_ + 1, 0


async def _has_round(context: RunContext, run: run_pb2.Run, round_: int) -> bool:
    if round_ == 0:
        return True
    if not is_adaptive(run) or round_ >= run.config.search.rounds:
        return False
    key = keys.plan(run.name, round_)
    await _wait_for_artifact(context, run, key)
    arrays = await asyncio.to_thread(context.store.map_arrays, key)
    return bool(arrays["plan.decodes"].any())


async def _wait_for_artifact(context: RunContext, run: run_pb2.Run, key: str) -> None:
    """Wait until an artifact exists.

    Raises an error when the run was cancelled or has failed.
    """
    while not await asyncio.to_thread(context.store.exists, key):
        await asyncio.to_thread(_check_alive, context, run)
        await asyncio.sleep(_POLL_S)


def _check_alive(context: RunContext, run: run_pb2.Run) -> None:
    if context.store.exists(keys.event(run.name, "cancelled")):
        raise Cancelled(f"{run.name} was cancelled")
    key = keys.event(run.name, "failed")
    if context.store.exists(key):
        failed = context.store.read_message(key, work_pb2.Event).failed
        raise NotReady(f"run {names.last(run.name)!r} failed: {failed.error}", reason=failed.reason or "RUN_FAILED")


def _responses(
    context: RunContext, run: run_pb2.Run, round_: int, shard: int, offset: int
) -> list[pb.IdentifyResponse]:
    """Return a shard's results of one round after `offset`, in bounded messages."""
    arrays = context.catalog.failures(run.name, round_, shard)
    count, dim = arrays["latent"].shape
    size = max(1, _RESPONSE_BYTES // (4 * dim + _FAILURE_BYTES + len(run.name)))
    responses = []
    for begin in range(offset, max(count, offset + 1), size):
        rows = range(begin, min(begin + size, count))
        position = StreamPosition(round_=round_, shard=shard, offset=begin + len(rows))
        failures = [_failure(run, {name: array[row] for name, array in arrays.items()}) for row in rows]
        responses.append(pb.IdentifyResponse(shard=shard, failures=failures, resume_token=position.token()))
    return responses


def _failure(run: run_pb2.Run, row: dict[str, Any]) -> failure_pb2.Failure:
    values = {name: value.item() for name, value in row.items() if name not in {"latent", "held_out"}}
    return failure_pb2.Failure(
        run=run.name,
        latent=row["latent"].tolist(),
        held_out=bool(row["held_out"]),
        model_version=run.config.model_version,
        **values,
    )
