"""Described calls, carried out on an event loop: what computes, or uses the disk, does so in a thread."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from defuse.aio.connection import Connection
from defuse.steps import Call, Pause, Step, Steps, Stream, User, Work

T = TypeVar("T")


async def perform(connection: Connection, steps: Steps[T]) -> T:
    """Carry out a call to its end; return what it returns."""
    given: Any = None
    raised: BaseException | None = None
    while True:
        try:
            step = steps.throw(raised) if raised else steps.send(given)
        except StopIteration as end:
            result: T = end.value
            return result
        given, raised = None, None
        try:
            given = await _take(connection, step)
        except BaseException as error:  # noqa: BLE001  # the call cleans up, and raises it or goes on
            raised = error


async def read(connection: Connection, stream: Stream[T]) -> AsyncGenerator[T, None]:
    """Yield what is read of a stream, as it comes."""
    try:
        async with aclosing(connection.watch(stream.method, stream.request, stream.timeout_s)) as answers:
            async for answer in answers:
                yield stream.read(answer)
    except GeneratorExit:
        if stream.abandoned:
            await perform(connection, stream.abandoned())
        raise


async def _take(connection: Connection, step: Step) -> Any:
    if isinstance(step, Call):
        return await connection.call(step.method, step.request, timeout_s=step.timeout_s)
    if isinstance(step, Work):
        return await asyncio.to_thread(step.function)
    if isinstance(step, User):
        return connection.bearer.user()
    if isinstance(step, Pause):
        return await asyncio.sleep(step.seconds)
    last = None
    async for value in read(connection, step):
        last = value
    return last
