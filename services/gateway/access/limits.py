"""How often one caller may call, and with how many calls at the same time.

Callers are told apart by their tokens, without one by their hosts. Calls of who is not let in count like all others, so
that nobody tries tokens or knocks as often as it likes. Inference does not count: Triton has queues of its
own, and who asks for it asks thousands of times a second.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote

import grpc
from defuse.errors import LimitExceeded
from defuse.loopback import host_of

from services.gateway.access import caller, roles
from services.runtime.interceptors import Continuation, around

_UNCOUNTED = "/inference."
# Callers whose rate is remembered; the one not heard of for longest is forgotten first.
_MOST_CALLERS = 10_000
# What may be called at once after a silence, in seconds of the rate.
_BURST_S = 1.0
# A wait this short is the rounding of sums with the clock's reading.
_ROUNDING_S = 1e-6


class Limits:
    """Counts the calls of each caller; 0 is no limit."""

    def __init__(self, *, calls_per_s: float, concurrent_calls: int) -> None:
        self._calls_per_s = calls_per_s
        self._concurrent_calls = concurrent_calls
        # When a caller's bucket of tokens is full again, on the monotonic clock.
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def counted(self, who: str) -> Iterator[None]:
        """Count a call as long as it lasts; raise LimitExceeded for one too many."""
        if self._concurrent_calls and self._under_way[who] >= self._concurrent_calls:
            raise LimitExceeded(
                f"{who} has {self._under_way[who]} calls under way, as many as one caller may have; end some, or wait",
                metadata={"limit": "DEFUSE_MAX_CONCURRENT_CALLS"},
            )
        if self._calls_per_s:
            self._take(who)
        self._under_way[who] += 1
        try:
            yield
        finally:
            self._under_way[who] -= 1
            if not self._under_way[who]:
                del self._under_way[who]

    def _take(self, who: str) -> None:
        """Take a token out of a caller's bucket."""
        now, token_s = time.monotonic(), 1 / self._calls_per_s
        full_at = max(self._full_at.get(who, now), now) + token_s
        wait_s = full_at - now - max(_BURST_S, token_s)
        if wait_s > _ROUNDING_S:
            raise LimitExceeded(
                f"{who} calls more than {self._calls_per_s:g} times a second; wait {wait_s:.2g} s",
                metadata={"limit": "DEFUSE_MAX_CALLS_PER_S"},
                retry_after_s=wait_s,
            )
        self._full_at[who] = full_at
        self._full_at.move_to_end(who)
        if len(self._full_at) > _MOST_CALLERS:
            self._full_at.popitem(last=False)


class LimitsInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls beyond the limits of their caller; before the doorkeeper, so that whom he refuses counts."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_UNCOUNTED) or roles.needed(method) is None:
            return handler
        return around(handler, self._counted)

    @asynccontextmanager
    async def _counted(self, request: Any, context: Any) -> AsyncIterator[Any]:
        with self._limits.counted(name_of_caller(context)):
            yield request


def name_of_caller(context: Any) -> str:
    """Return who calls: the name of a token, else where the call comes from, without the port."""
    known = caller.present()
    return known.name if known else host_of(unquote(context.peer()).partition(":")[2])
