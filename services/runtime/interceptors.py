"""Server interceptors: errors, deadlines, metrics, logging and draining."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
from defuse.errors import DeadlineExceeded, DefuseError, Internal, Unavailable, to_status
from grpc_status import rpc_status

from services.runtime import telemetry
from services.runtime.queue import REDIS_AWAY

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Converts exceptions of methods to statuses.

    Callers never receive a stack trace.
    """

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        wrap = _streaming if handler.response_streaming else _unary
        wrapped = wrap(handler_call_details.method, getattr(handler, _kind(handler)))
        return _maker(handler)(wrapped, handler.request_deserializer, handler.response_serializer)


def rejecting_handler(handler: Any, error: DefuseError) -> Any:
    """Return a handler of the same kind that raises an error."""

    async def unary(_: Any, __: Any) -> None:
        raise error

    async def streaming(_: Any, __: Any) -> AsyncIterator[Any]:
        raise error
        yield  # makes it a stream

    return _maker(handler)(streaming if handler.response_streaming else unary, handler.request_deserializer)


def wrap_handler(handler: Any, manager: Callable[[Any, Any], AbstractAsyncContextManager[Any]]) -> Any:
    """Return a handler whose calls run within a context manager.

    `manager(request, context)` yields the request for the method.
    """
    inner = getattr(handler, _kind(handler))

    async def unary(request: Any, context: Any) -> Any:
        async with manager(request, context) as given:
            return await inner(given, context)

    async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
        async with manager(request, context) as given:
            async for response in _responses(inner(given, context)):
                yield response

    call = streaming if handler.response_streaming else unary
    return _maker(handler)(call, handler.request_deserializer, handler.response_serializer)


def _kind(handler: Any) -> str:
    sides = (handler.request_streaming, handler.response_streaming)
    return "_".join("stream" if streaming else "unary" for streaming in sides)


def _maker(handler: Any) -> Callable[..., Any]:
    maker: Callable[..., Any] = getattr(grpc, f"{_kind(handler)}_rpc_method_handler")
    return maker


def _unary(method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        start = time.perf_counter()
        try:
            response = await inner(request, context)
        except Exception as error:  # noqa: BLE001  # everything becomes a status
            await _abort(context, method, start, error)
        _measure(method, "OK", start)
        return response

    return call


def _streaming(method: str, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        start = time.perf_counter()
        try:
            async for response in _responses(inner(request, context)):
                yield response
        except Exception as error:  # noqa: BLE001  # everything becomes a status
            await _abort(context, method, start, error)
        _measure(method, "OK", start)

    return call


async def _responses(answer: Any) -> AsyncIterator[Any]:
    """Yield the responses of a streaming method.

    The method may also be a coroutine that writes to the context, as the health service's is.
    """
    if hasattr(answer, "__aiter__"):
        async for response in answer:
            yield response
    else:
        await answer


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, start: float, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = to_known_error(error)
    status = rpc_status.to_status(to_status(known))
    _measure(method, status.code.name, start)
    if isinstance(known, Internal):
        telemetry.log().error("call_failed", method=method, exc_info=error)
    else:
        telemetry.log().info("call_refused", method=method, reason=known.reason, error=known.message)
    await context.abort(status.code, status.details, status.trailing_metadata)


def to_known_error(error: BaseException) -> DefuseError:
    """Return the error that a caller receives for an exception."""
    if isinstance(error, DefuseError):
        return error
    if isinstance(error, REDIS_AWAY):
        return Unavailable(
            f"Redis does not answer ({error}); it must be started before this call can be answered",
            reason="REDIS_UNAVAILABLE",
        )
    return Internal("an unexpected error; the server's log has the details under this call's time")


def _measure(method: str, code: str, start: float) -> None:
    _histogram(method, code).observe(time.perf_counter() - start)


@functools.cache  # methods and codes are few, and a lookup takes longer than a count
def _histogram(method: str, code: str) -> Any:
    return telemetry.RPC_SECONDS.labels(method, code)


class DeadlineInterceptor(grpc.aio.ServerInterceptor):
    """Ends unary calls without a deadline after a time limit.

    Streams are not limited.
    """

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
                if not limit.expired():  # a deadline set on the way
                    raise
                raise DeadlineExceeded(
                    f"the call has no deadline and no answer within {self._default_s:g} s; give it a longer one",
                    metadata={"limit": "DEFUSE_DEFAULT_DEADLINE_S"},
                ) from error

        return call


# Time that the last answers need to be sent.
_ANSWER_S = 1.0


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """Tracks calls, and stops a server without any CANCELLED call.

    gRPC itself ends calls as CANCELLED, which callers take for an intended cancellation. After UNAVAILABLE they retry.
    """

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._over = False

    async def stop(self, server: grpc.aio.Server, drain_s: float) -> None:
        """Reject new calls, and end those under way after some seconds.

        These calls end as UNAVAILABLE.
        """
        stopping = asyncio.create_task(server.stop(drain_s + _ANSWER_S))
        await asyncio.wait([stopping], timeout=drain_s)
        self._over = True
        self._ended |= self._under_way
        for call in self._ended:
            call.cancel()
        await stopping

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        return handler and wrap_handler(handler, self._known)

    @asynccontextmanager
    async def _known(self, request: Any, _: Any) -> AsyncIterator[Any]:
        if self._over:
            raise _stopping()
        call = asyncio.current_task()
        assert call
        self._under_way.add(call)
        try:
            yield request
        except asyncio.CancelledError:
            if call not in self._ended:  # the caller has disconnected
                raise
            call.uncancel()
            raise _stopping() from None
        finally:
            self._under_way.discard(call)


def _stopping() -> Unavailable:
    return Unavailable("this server stops; ask again, another one may be there", reason="STOPPING")
