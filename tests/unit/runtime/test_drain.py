"""A real server that stops while calls of every kind are under way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from defuse.errors import DefuseError, Unavailable, from_rpc_error

from services.runtime.interceptors import DrainInterceptor, ErrorInterceptor

LONG_S = 20.0
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream", "written_stream"]
Story = Callable[[grpc.aio.Channel, "Planted"], Awaitable[Any]]


class Planted:
    """A server whose methods answer once they may, and that can be stopped."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.reached = asyncio.Event()
        self.cancelled = 0
        self._drain = DrainInterceptor()
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor(), self._drain])
        methods = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self._unary),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self._stream),
            "written_stream": grpc.unary_stream_rpc_method_handler(self._written),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("planted.Service", methods)])

    async def start(self) -> int:
        port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def stop(self, drain_s: float) -> None:
        await asyncio.wait_for(self._drain.stop(self._server, drain_s), LONG_S)

    async def _unary(self, _: Any, __: Any) -> bytes:
        self.reached.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return b"whole"

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self._unary(request, context)

    async def _written(self, request: Any, context: Any) -> None:
        """Answer as gRPC's health service does."""
        await context.write(b"first")
        await context.write(await self._unary(request, context))


def told(story: Story) -> Any:
    async def tell() -> Any:
        planted = Planted()
        port = await planted.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await asyncio.wait_for(story(channel, planted), 2 * LONG_S)
        finally:
            await planted.stop(0)

    return asyncio.run(tell())


async def begun(channel: grpc.aio.Channel, planted: Planted, kind: str) -> Any:
    """Return a call of a kind that waits in its method."""
    method = getattr(channel, kind.replace("written", "unary"))(f"/planted.Service/{kind}")
    call = method(waiting() if kind.startswith("stream") else b"")
    if kind.endswith("stream"):
        assert await call.read() == b"first"
    await asyncio.wait_for(planted.reached.wait(), LONG_S)
    return call


async def waiting() -> AsyncIterator[bytes]:
    """Requests of a caller who has more to say."""
    yield b""
    await asyncio.sleep(LONG_S)


async def rest(call: Any, kind: str) -> bytes | DefuseError:
    """Return the last answer to a call, or what it ends with."""
    try:
        answer: bytes = await (call.read() if kind.endswith("stream") else call)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, address="here:1")
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_end_in_time(kind: str) -> None:
    """It is told that the server stops, and never that it was cancelled."""

    async def story(channel: grpc.aio.Channel, planted: Planted) -> Any:
        call = await begun(channel, planted, kind)
        await planted.stop(0.1)
        return await rest(call, kind)

    error = told(story)
    assert (type(error), error.reason) == (Unavailable, "STOPPING")


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_in_time(kind: str) -> None:
    """It has its answer, and the server waits no longer than it has to."""

    async def story(channel: grpc.aio.Channel, planted: Planted) -> Any:
        call = await begun(channel, planted, kind)
        stopping = asyncio.create_task(planted.stop(2 * LONG_S))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        planted.may_answer.set()
        answer = await rest(call, kind)
        await stopping
        return answer

    assert told(story) == b"whole"


def test_a_caller_that_goes_away() -> None:
    """Its call ends as its own wish, also while a server stops."""

    async def story(channel: grpc.aio.Channel, planted: Planted) -> tuple[bool, int]:
        call = await begun(channel, planted, "unary_unary")
        call.cancel()
        await planted.stop(LONG_S)
        return call.cancelled(), planted.cancelled

    assert told(story) == (True, 1)


def test_what_comes_after_the_end() -> None:
    """A call that gRPC had accepted, but whose request came late, is not begun."""

    async def late() -> Any:
        drain = DrainInterceptor()
        await drain.stop(grpc.aio.server(), 0)

        async def method(_: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda *_: pytest.fail("it was called"))

        handler = await drain.intercept_service(method, None)
        return await handler.unary_unary(b"", None)

    with pytest.raises(Unavailable, match="stops"):
        asyncio.run(late())
