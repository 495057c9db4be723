"""Calls that come with a deadline or without one, before a real server that does not answer by itself."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from defuse.errors import DeadlineExceeded, DefuseError, Internal, from_rpc_error

from services.runtime.interceptors import DeadlineInterceptor, ErrorInterceptor

DEFAULT_S = 0.1
Ask = Callable[[grpc.aio.Channel, asyncio.Event], Awaitable[Any]]


def served(ask: Ask) -> Any:
    """Serve methods that answer once they may; return what `ask` returns."""

    async def run() -> Any:
        may_answer = asyncio.Event()

        async def wait(request: bytes, _: Any) -> bytes:
            await may_answer.wait()
            return request

        async def stream(request: bytes, _: Any) -> AsyncIterator[bytes]:
            yield request
            await may_answer.wait()
            yield request

        async def late(_: bytes, __: Any) -> bytes:
            raise TimeoutError

        methods: dict[str, Any] = {
            "Wait": grpc.unary_unary_rpc_method_handler(wait),
            "Stream": grpc.unary_stream_rpc_method_handler(stream),
            "Late": grpc.unary_unary_rpc_method_handler(late),
        }
        server = grpc.aio.server(interceptors=[ErrorInterceptor(), DeadlineInterceptor(default_s=DEFAULT_S)])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("planted.Service", methods)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await asyncio.wait_for(ask(channel, may_answer), 30)
        finally:
            await server.stop(None)

    return asyncio.run(run())


async def error_of(call: Awaitable[Any]) -> DefuseError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, address="here:1")


def test_a_call_without_a_deadline_ends() -> None:
    """After the default it is told so, and by which setting."""

    async def ask(channel: grpc.aio.Channel, _: asyncio.Event) -> DefuseError:
        return await error_of(channel.unary_unary("/planted.Service/Wait")(b""))

    error = served(ask)
    assert type(error) is DeadlineExceeded
    assert "has no deadline and no answer within 0.1 s" in error.message
    assert error.metadata == {"limit": "DEFUSE_DEFAULT_DEADLINE_S"}


def test_longer_deadlines_and_streams_are_the_callers_business() -> None:
    """Both outlive calls that the default ended, and are answered."""

    async def ask(channel: grpc.aio.Channel, may_answer: asyncio.Event) -> Any:
        wait = channel.unary_unary("/planted.Service/Wait")
        patient = asyncio.ensure_future(wait(b"patient", timeout=20))
        stream = channel.unary_stream("/planted.Service/Stream")(b"stream")
        first = await stream.read()
        for _ in range(3):
            await error_of(wait(b""))
        may_answer.set()
        return await patient, [first, await stream.read()]

    assert served(ask) == (b"patient", [b"stream", b"stream"])


def test_a_time_that_was_over_elsewhere() -> None:
    """A method's own TimeoutError is a defect of the method, and not taken for the default."""

    async def ask(channel: grpc.aio.Channel, _: asyncio.Event) -> DefuseError:
        return await error_of(channel.unary_unary("/planted.Service/Late")(b""))

    assert type(served(ask)) is Internal
