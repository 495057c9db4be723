"""Errors over a real connection: a server in this process whose methods raise what they are told to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import redis.exceptions
from defuse.errors import (
    CODES,
    DefuseError,
    Internal,
    InvalidInput,
    LimitExceeded,
    NotFound,
    Unavailable,
    from_rpc_error,
)

from services.runtime.interceptors import ErrorInterceptor

Method = Callable[[bytes, Any], Any]
SECRET = "password=hunter2"


class ModelNotFound(NotFound):
    """A class that no table knows, below one that it does."""


def raising(error: BaseException) -> dict[str, Method]:
    """Return a method of each kind that raises an error; the streaming ones say something first."""

    async def unary(request: Any, _: Any) -> bytes:
        await read(request)
        raise error

    async def stream(request: Any, _: Any) -> AsyncIterator[bytes]:
        await read(request)
        yield b"first"
        raise error

    return {"unary_unary": unary, "unary_stream": stream, "stream_unary": unary, "stream_stream": stream}


async def read(request: Any) -> None:
    """Read a stream of requests to its end: gRPC's aio client reports INTERNAL for a call that ends during a write."""
    if hasattr(request, "__aiter__"):
        async for _ in request:
            pass


def handlers(methods: dict[str, Method]) -> grpc.GenericRpcHandler:
    made = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(method) for kind, method in methods.items()}
    handler: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler("planted.Service", made)
    return handler


async def call(channel: grpc.aio.Channel, kind: str) -> list[bytes]:
    """Call the method of a kind; return everything that it answers."""
    method = getattr(channel, kind)(f"/planted.Service/{kind}")
    argument = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
    if kind.endswith("unary"):
        return [await method(argument)]
    return [answer async for answer in method(argument)]


def served(methods: dict[str, Method], ask: Callable[[grpc.aio.Channel], Awaitable[Any]]) -> Any:
    """Serve the methods behind the interceptor on a free port; return what `ask` returns."""

    async def run() -> Any:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        server.add_generic_rpc_handlers((handlers(methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await ask(channel)
        finally:
            await server.stop(None)

    return asyncio.run(run())


def error_of(error: BaseException, kind: str = "unary_unary") -> grpc.aio.AioRpcError:
    """Return what a caller sees when a method raises an error."""

    async def ask(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, kind)
        return caught.value

    seen: grpc.aio.AioRpcError = served(raising(error), ask)
    return seen


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_every_class_travels(cls: type[DefuseError]) -> None:
    """Each class arrives as its status code, and is read back as itself with sentence, reason and metadata."""
    reason = cls.default_reason if cls is LimitExceeded else "PLANTED"
    sent = cls("region 'ř9' is not there; look again", reason=reason, metadata={"region": "r9"})
    seen = error_of(sent)
    assert seen.code() is CODES[cls]
    read = from_rpc_error(seen, address="here:1")
    assert type(read) is cls
    assert (read.message, read.reason, read.metadata) == (sent.message, reason, {"region": "r9"})


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
def test_every_kind_of_method(kind: str) -> None:
    """Errors travel from methods of each kind, also after the first answers of a stream."""
    read = from_rpc_error(error_of(InvalidInput("wrong", reason="BAD"), kind), address="here:1")
    assert (type(read), read.reason) == (InvalidInput, "BAD")


def test_answers_pass_untouched() -> None:
    """Where nothing is raised the answers arrive as they are."""

    async def unary(request: bytes, _: Any) -> bytes:
        return request * 2

    async def stream(request: bytes, _: Any) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield request

    async def ask(channel: grpc.aio.Channel) -> list[list[bytes]]:
        return [await call(channel, kind) for kind in ("unary_unary", "unary_stream")]

    assert served({"unary_unary": unary, "unary_stream": stream}, ask) == [[b"aa"], [b"a"] * 3]


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_an_unexpected_error_keeps_its_text(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A defect is INTERNAL for the caller, who is not told what was in it; the log is."""
    seen = error_of(RuntimeError(SECRET), kind)
    assert seen.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(seen)
    assert type(from_rpc_error(seen, address="here:1")) is Internal
    output = capsys.readouterr()
    assert SECRET in output.out + output.err


def test_a_class_below_a_known_one() -> None:
    """A subclass of a known class is what its parent is, not a defect."""
    seen = error_of(ModelNotFound("no model 'x'"))
    assert seen.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(seen, address="here:1").message == "no model 'x'"


@pytest.mark.parametrize("letter", ["x", "ř", "字"])
def test_a_long_sentence_arrives(letter: str) -> None:
    """However long a sentence is, for instance with another server's words in it, class and reason arrive."""
    seen = error_of(InvalidInput(letter * 30_000, reason="LONG", field="config.name"))
    read = from_rpc_error(seen, address="here:1")
    assert (type(read), read.reason, read.field) == (InvalidInput, "LONG", "config.name")
    assert read.message.startswith(letter * 200)


@pytest.mark.parametrize("gone", [redis.exceptions.ConnectionError("refused"), redis.exceptions.TimeoutError("late")])
def test_redis_that_is_away(gone: Exception) -> None:
    """A Redis that does not answer is Unavailable with a reason of its own."""
    read = from_rpc_error(error_of(gone), address="here:1")
    assert (type(read), read.reason) == (Unavailable, "REDIS_UNAVAILABLE")
    assert "Redis" in read.message


def test_an_unknown_method() -> None:
    """A method that is not there is answered by gRPC itself."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
        return caught.value.code()

    assert served({}, ask) is grpc.StatusCode.UNIMPLEMENTED


def test_a_method_that_aborts_itself() -> None:
    """A status that a method set itself reaches the caller unchanged."""

    async def unary(_: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "past the end")
        return b""

    async def ask(channel: grpc.aio.Channel) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
        return caught.value.code(), caught.value.details()

    assert served({"unary_unary": unary}, ask) == (grpc.StatusCode.OUT_OF_RANGE, "past the end")
