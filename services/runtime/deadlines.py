"""Deadlines of calls that come without one: no call waits for ever for a server that hangs."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from defuse.errors import DeadlineExceeded

from services.runtime.interceptors import Continuation


class DeadlineInterceptor(grpc.aio.ServerInterceptor):
    """Ends single calls without a deadline after a time; streams go on as long as both sides want them."""

    def __init__(self, *, default_s: float) -> None:
        self._default_s = default_s

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        bounded = self._bounded(handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(bounded, handler.request_deserializer, handler.response_serializer)

    def _bounded(self, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            if context.time_remaining() is not None:
                return await inner(request, context)
            try:
                async with asyncio.timeout(self._default_s) as limit:
                    return await inner(request, context)
            except TimeoutError as error:
                if not limit.expired():  # somebody else's, on the way
                    raise
                raise DeadlineExceeded(
                    f"the call has no deadline and no answer within {self._default_s:g} s; give it a longer one",
                    metadata={"limit": "DEFUSE_DEFAULT_DEADLINE_S"},
                ) from error

        return call
