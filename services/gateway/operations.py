"""Operations found, listed, waited for, cancelled and forgotten."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from defuse import names
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import run_pb2
from google.longrunning.operations_proto_pb2 import Operation

from services.gateway.corrections import Corrections
from services.gateway.operation_view import of_correction, of_run
from services.gateway.paging import Cursor, Page, Placed, Position
from services.gateway.runs import Runs
from services.runtime.queue import KEY, Queue

# Names of operations that were deleted; what they did is not.
_FORGOTTEN = f"{KEY}operations:forgotten"
_FILTERS = {"": None, "done=true": True, "done=false": False}
_EVERYWHERE = {"", "runs/-"}


class Operations:
    """What takes long, by the names `runs/{run}/operations/{operation}`."""

    def __init__(self, queue: Queue, runs: Runs, corrections: Corrections) -> None:
        self._redis = queue.redis
        self._runs = runs
        self._corrections = corrections

    async def get(self, name: str) -> Operation:
        """Return an operation; raise NotFound for an unknown name, or one that was deleted."""
        target = _target(await self._known(name))
        try:
            if "/corrections/" in target:
                return of_correction(await self._corrections.get(target))
            return of_run(await self._runs.get(target))
        except NotFound as error:
            raise _unknown(name) from error

    async def list(self, parent: str, wanted: str, cursor: Cursor) -> Page[Operation]:
        """Return a page of the operations of a run, or of all runs, that a filter lets through.

        Runs come newest first, each one's search before its corrections, these oldest first.
        """
        run = None if parent in _EVERYWHERE else await self._runs.get(parent)
        return await cursor.page_of(self._filtered(run, _filter(wanted), cursor.after))

    async def wait(self, name: str, timeout_s: float | None) -> Operation:
        """Return an operation as soon as it has ended, or after `timeout_s` seconds as it then is."""
        operation = await self.get(name)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), aclosing(self._followed(_target(name))) as followed:
                async for latest in followed:
                    operation = latest
        return operation

    async def cancel(self, name: str) -> None:
        """Stop what an operation does; no effect on one that has ended."""
        target = _target(await self._known(name))
        if "/corrections/" in target:
            await self._corrections.cancel(target)
        else:
            await self._runs.cancel(target)

    async def delete(self, name: str) -> None:
        """Forget an operation that has ended; raise NotReady while it has not."""
        if not (await self.get(name)).done:
            raise NotReady(f"operation {name!r} has not ended; cancel it first, or wait", reason="OPERATION_UNDER_WAY")
        await self._redis.sadd(_FORGOTTEN, name)

    async def _known(self, name: str) -> str:
        names.check(name, "runs/*/operations/*")
        if await self._redis.sismember(_FORGOTTEN, name):
            raise _unknown(name)
        return name

    async def _followed(self, target: str) -> AsyncGenerator[Operation, None]:
        """Yield the operation of a record now and whenever it changes, until it has ended."""
        if "/corrections/" in target:
            async for correction in self._corrections.watch(target):
                yield of_correction(correction)
        else:
            async for run in self._runs.watch(target):
                yield of_run(run)

    async def _filtered(
        self, run: run_pb2.Run | None, done: bool | None, after: Position
    ) -> AsyncGenerator[Placed[Operation], None]:
        found = self._of_run(run, after) if run else self._of_all(after)
        async with aclosing(found) as placed:
            async for position, operation in placed:
                if done in {None, operation.done} and not await self._redis.sismember(_FORGOTTEN, operation.name):
                    yield position, operation

    async def _of_all(self, after: Position) -> AsyncGenerator[Placed[Operation], None]:
        """Yield the operations of all runs; a position is that of the run, then that within it."""
        if after:
            run = await self._runs.get(after[1])
            async for position, operation in self._of_run(run, after[2:]):
                yield [*after[:2], *position], operation
        async for place, run in self._runs.book.after("", after[:2], newest_first=True):
            async for position, operation in self._of_run(run, ()):
                yield [*place, *position], operation

    async def _of_run(self, run: run_pb2.Run, after: Position) -> AsyncGenerator[Placed[Operation], None]:
        """Yield a run's search, then its corrections; a position is the search's, then the correction's."""
        if not after:
            yield [names.SEARCH], of_run(run)
        async for position, correction in self._corrections.book.after(run.name, after[1:]):
            yield [names.SEARCH, *position], of_correction(correction)


def _target(name: str) -> str:
    """Return the record that an operation is a view of."""
    run, operation = names.parent(name), names.last(name)
    return run if operation == names.SEARCH else names.correction(names.last(run), operation)


def _filter(wanted: str) -> bool | None:
    plain = wanted.replace(" ", "").lower()
    if plain not in _FILTERS:
        raise InvalidInput(
            f"the filter {wanted!r} is not understood; use done=true, done=false, or none", reason="BAD_FILTER"
        )
    return _FILTERS[plain]


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no operation {name!r}; list those of its run", reason="OPERATION_NOT_FOUND")
