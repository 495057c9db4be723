"""Server interceptors for authentication, authorisation and rate limits.

Callers are distinguished by token, or by host when they send none. Rejected calls count
towards the limits, so that nobody can guess tokens at will. Inference calls do not
count: Triton has queues of its own, and clients make thousands of such calls a second.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote

import grpc
from defuse.errors import DefuseError, LimitExceeded, Unauthenticated
from defuse.tls import host_of

from services.gateway.access import roles
from services.gateway.access.roles import Caller
from services.gateway.tokens import Tokens
from services.runtime.interceptors import Continuation, rejecting_handler, wrap_handler

_HEADER, _SCHEME = "authorization", "bearer"


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates callers by token and checks the role that each call requires."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            self._admit(handler_call_details)
        except DefuseError as error:
            return rejecting_handler(handler, error)
        return handler

    def _admit(self, call: grpc.HandlerCallDetails) -> None:
        if (role := roles.required_role(call.method)) is not None:
            roles.set_caller(authenticate(self._tokens, _said(call.invocation_metadata or ())))
            roles.require(role, call.method.rpartition("/")[2])


def _said(metadata: Iterable[tuple[str, Any]]) -> str:
    return next((value for key, value in metadata if key == _HEADER), "")


def authenticate(tokens: Tokens, said: str) -> Caller:
    """Return the caller of a `Bearer TOKEN` header.

    Raises Unauthenticated for any other header or an unknown token.
    """
    scheme, _, token = said.partition(" ")
    if scheme.lower() != _SCHEME:
        raise Unauthenticated(
            "the call has no token (`authorization: Bearer TOKEN`); set DEFUSE_TOKEN, and ask an admin for one",
            reason="NO_TOKEN",
        )
    if found := tokens.caller(token):
        return found
    raise Unauthenticated(
        "the token is not known here; was it replaced? Set DEFUSE_TOKEN to a new one", reason="UNKNOWN_TOKEN"
    )


_UNCOUNTED = "/inference."
# Callers whose rate is remembered; the least recently seen one is evicted first.
_MOST_CALLERS = 10_000
# Largest burst after a pause, in seconds of the rate.
_BURST_S = 1.0
# A shorter wait is a rounding error of sums with the clock's reading.
_ROUNDING_S = 1e-6


class RateLimits:
    """Token buckets and concurrency limits by caller; 0 means no limit."""

    def __init__(self, *, calls_per_s: float, concurrent_calls: int) -> None:
        self._calls_per_s = calls_per_s
        self._concurrent_calls = concurrent_calls
        # Monotonic time at which a caller's bucket is full again.
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def admitted(self, who: str) -> Iterator[None]:
        """Count a call while the block runs; raise LimitExceeded beyond the limits."""
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
        """Take a token from a caller's bucket."""
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


class RateLimitInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls beyond the rate limits of their caller.

    It runs before authentication, so that rejected calls count as well.
    """

    def __init__(self, limits: RateLimits) -> None:
        self._limits = limits

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_UNCOUNTED) or roles.required_role(method) is None:
            return handler
        return wrap_handler(handler, self._admitted)

    @asynccontextmanager
    async def _admitted(self, request: Any, context: Any) -> AsyncIterator[Any]:
        with self._limits.admitted(caller_name(context)):
            yield request


def caller_name(context: Any) -> str:
    """Return the name of the caller's token, or its address without port."""
    known = roles.current_caller()
    return known.name if known else host_of(unquote(context.peer()).partition(":")[2])
