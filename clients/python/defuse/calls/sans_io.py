"""Calls without I/O, which `defuse.Client` and `defuse.aio.Client` execute.

A call is a generator. It yields steps, receives their results, and returns the caller's value. An exception of a step
is raised at its `yield` (https://sans-io.readthedocs.io describes the pattern).
"""

import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from defuse.errors import InvalidInput, Unavailable

T = TypeVar("T")
_RETRY_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Rpc:
    """The step that sends a request; its result is the response.

    `request` is a message, or an iterator of messages for a client stream. Without `timeout_s` the deadline is the
    connection's.
    """

    method: str
    request: Any
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class StreamRpc(Generic[T]):
    """The step that reads a server stream to its end.

    Its result is the last value, or None for an empty stream. A broken stream is requested again. `parse` may change
    `request`, so that the next attempt resumes where the last one broke. `on_early_close` runs when the reader closes
    the iterator before the end of the stream.
    """

    method: str
    request: Any
    parse: Callable[[Any], T]
    # None: no limit.
    timeout_s: float | None = None
    on_early_close: "Callable[[], SansIoCall[Any]] | None" = None


@dataclass(frozen=True, kw_only=True)
class Sleep:
    """The step that waits for some seconds."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class CurrentUser:
    """The step that returns the default actor.

    Its result is the user's name, or empty for callers with a token, whom the gateway knows.
    """


@dataclass(frozen=True, kw_only=True)
class BlockingWork:
    """The step that runs a blocking function, with its return value."""

    function: Callable[[], Any]


Step: TypeAlias = Rpc | StreamRpc[Any] | Sleep | CurrentUser | BlockingWork
SansIoCall: TypeAlias = Generator[Step, Any, T]


def new_request_id() -> str:
    """Return a unique request id, which makes retries of a request idempotent."""
    return str(uuid.uuid4())


def build_message(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Return a protobuf message with the given fields.

    A value of None leaves its field out. Raises InvalidInput for unknown fields and wrong types.
    """
    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"settings {dict(values)} are not valid: {error}") from error


def list_all_pages(method: str, request: Any, field: str) -> SansIoCall[list[Any]]:
    """Return the entries of all pages of a list call.

    `field` is the field of a response that has the entries.
    """
    entries: list[Any] = []
    while True:
        response = yield Rpc(method=method, request=request)
        entries += getattr(response, field)
        if not response.next_page_token:
            return entries
        request.page_token = response.next_page_token


def retry_while_unavailable(rpc: Rpc, timeout_s: float) -> SansIoCall[Any]:
    """Retry an idempotent request while the gateway is unavailable.

    Returns the response. Raises Unavailable after `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            return (yield rpc)
        except Unavailable:
            if time.monotonic() >= end:
                raise
            yield Sleep(seconds=_RETRY_INTERVAL_S)
