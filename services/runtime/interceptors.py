"""What happens around every call: errors become statuses with their reasons, and each call is measured and logged."""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
from defuse.errors import DefuseError, Internal, Unavailable, to_status
from grpc_status import rpc_status

from services.runtime import telemetry
from services.runtime.queue import GONE

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a method raises into a status; a caller never sees a stack trace."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        wrap = _streaming if handler.response_streaming else _unary
        wrapped = wrap(handler_call_details.method, getattr(handler, _kind(handler)))
        return _maker(handler)(wrapped, handler.request_deserializer, handler.response_serializer)


def refusal(handler: Any, error: DefuseError) -> Any:
    """Return a handler of the same kind whose calls raise an error."""

    async def unary(_: Any, __: Any) -> None:
        raise error

    async def streaming(_: Any, __: Any) -> AsyncIterator[Any]:
        raise error
        yield  # makes it a stream

    return _maker(handler)(streaming if handler.response_streaming else unary, handler.request_deserializer)


def around(handler: Any, manager: Callable[[Any, Any], AbstractAsyncContextManager[Any]]) -> Any:
    """Return a handler whose calls are made within `manager(request, context)`, with the request that it gives."""
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
    """Yield what a streaming method answers; the health service's is a coroutine that writes to the context itself."""
    if hasattr(answer, "__aiter__"):
        async for response in answer:
            yield response
    else:
        await answer


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, start: float, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = known_error(error)
    status = rpc_status.to_status(to_status(known))
    _measure(method, status.code.name, start)
    if isinstance(known, Internal):
        telemetry.log().error("call_failed", method=method, exc_info=error)
    else:
        telemetry.log().info("call_refused", method=method, reason=known.reason, error=known.message)
    await context.abort(status.code, status.details, status.trailing_metadata)


def known_error(error: BaseException) -> DefuseError:
    """Return what a caller is told of an error."""
    if isinstance(error, DefuseError):
        return error
    if isinstance(error, GONE):
        return Unavailable(
            f"Redis does not answer ({error}); it must be started before this call can be answered",
            reason="REDIS_UNAVAILABLE",
        )
    return Internal("an unexpected error; the server's log has the details under this call's time")


def _measure(method: str, code: str, start: float) -> None:
    _histogram(method, code).observe(time.perf_counter() - start)


@functools.cache  # methods and codes are few, and to look one up takes longer than to count
def _histogram(method: str, code: str) -> Any:
    return telemetry.RPC_SECONDS.labels(method, code)
