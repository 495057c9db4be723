"""Described calls, carried out one step after the other while the caller waits."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

from defuse.connection import Connection
from defuse.steps import Call, Pause, Step, Steps, Stream, User, Work

T = TypeVar("T")


def perform(connection: Connection, steps: Steps[T]) -> T:
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
            given = _take(connection, step)
        except BaseException as error:  # noqa: BLE001  # the call cleans up, and raises it or goes on
            raised = error


def read(connection: Connection, stream: Stream[T]) -> Iterator[T]:
    """Yield what is read of a stream, as it comes."""
    try:
        for answer in connection.watch(stream.method, stream.request, stream.timeout_s):
            yield stream.read(answer)
    except GeneratorExit:
        if stream.abandoned:
            perform(connection, stream.abandoned())
        raise


def _take(connection: Connection, step: Step) -> Any:
    if isinstance(step, Call):
        return connection.call(step.method, step.request, timeout_s=step.timeout_s)
    if isinstance(step, Work):
        return step.function()
    if isinstance(step, User):
        return connection.bearer.user()
    if isinstance(step, Pause):
        return time.sleep(step.seconds)
    last = None
    for value in read(connection, step):
        last = value
    return last
