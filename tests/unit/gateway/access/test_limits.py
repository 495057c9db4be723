"""How often a caller may call: counted by themselves, and before a real server."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from defuse.errors import DefuseError, LimitExceeded, PermissionDenied, Unauthenticated, from_rpc_error
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc

from services.gateway.access import interceptors
from services.gateway.access.interceptors import AccessInterceptor, RateLimitInterceptor, RateLimits
from services.gateway.tokens import Tokens, line_of
from services.runtime.interceptors import ErrorInterceptor


def allowed(counts: RateLimits, who: str) -> bool:
    try:
        with counts.admitted(who):
            return True
    except LimitExceeded:
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of the limits; it stands still until a test sets `now`."""
    found = SimpleNamespace(now=1000.0, monotonic=lambda: found.now)
    monkeypatch.setattr(interceptors, "time", found)
    return found


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("rate", "at_once"), [(5.0, 5), (0.1, 1)])
def test_a_seconds_worth_at_once(rate: float, at_once: int) -> None:
    """After a silence a caller may call as often as in a second of its rate, at least once; others are not touched."""
    counts = RateLimits(calls_per_s=rate, concurrent_calls=0)
    assert [allowed(counts, "ann") for _ in range(at_once + 2)] == [True] * at_once + [False] * 2
    assert allowed(counts, "bob")


def test_the_burst_is_the_same_at_any_time(clock: Any) -> None:
    """Rounded sums with the clock's reading refuse no call of the burst, and allow none after it."""
    for number in range(1000):
        clock.now = 1000 + number / 7
        for rate, at_once in ((0.01, 1), (5.0, 5)):
            counts = RateLimits(calls_per_s=rate, concurrent_calls=0)
            assert [allowed(counts, "ann") for _ in range(at_once + 1)] == [True] * at_once + [False]


def test_who_waits_as_long_as_is_said_is_answered(clock: Any) -> None:
    """A refusal says when, by whom and by which setting; calls that were refused do not count."""
    counts = RateLimits(calls_per_s=4, concurrent_calls=0)
    while allowed(counts, "ann"):
        pass
    clock.now += 0.125
    with (
        pytest.raises(LimitExceeded, match=r"ann calls more than 4 times a second; wait 0\.12 s") as refused,
        ExitStack() as s,
    ):
        s.enter_context(counts.admitted("ann"))
    assert refused.value.retry_after_s == 0.125
    assert refused.value.metadata == {"limit": "DEFUSE_MAX_CALLS_PER_S"}
    clock.now += 0.124
    assert not allowed(counts, "ann")
    clock.now += 0.001
    assert allowed(counts, "ann")
    assert not allowed(counts, "ann")


def test_calls_at_the_same_time() -> None:
    """As many as the limit may be under way; each that ends makes room for another."""
    counts = RateLimits(calls_per_s=0, concurrent_calls=2)
    with counts.admitted("ann"):
        with counts.admitted("ann"):
            assert not allowed(counts, "ann")
            assert allowed(counts, "bob")
        assert allowed(counts, "ann")


def test_without_limits() -> None:
    counts = RateLimits(calls_per_s=0, concurrent_calls=0)
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(counts.admitted("ann"))


@pytest.mark.usefixtures("clock")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently seen caller is evicted first; ended calls leave no state."""
    monkeypatch.setattr(interceptors, "_MOST_CALLERS", 3)
    counts = RateLimits(calls_per_s=1, concurrent_calls=9)
    assert [allowed(counts, who) for who in ("a", "b", "c", "a", "d", "b", "a")] == [True] * 3 + [
        False,
        True,
        False,
        True,
    ]
    assert len(counts._full_at) == 3
    assert not counts._under_way


class Gateway(pb_grpc.GatewayServiceServicer):
    """Has streams that go on until the caller ends them."""

    async def GetVersion(self, request: pb.GetVersionRequest, context: Any) -> pb.GetVersionResponse:  # noqa: N802  # gRPC's name
        return pb.GetVersionResponse()

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:  # noqa: N802
        yield pb.WatchRunResponse()
        await asyncio.Event().wait()


def before_the_gateway(ask: Callable[[grpc.aio.Channel], Awaitable[Any]], counts: RateLimits, tokens: Path) -> Any:
    """Serve the gateway to callers with tokens; return what `ask` returns."""

    async def run() -> Any:
        guards = [ErrorInterceptor(), RateLimitInterceptor(counts), AccessInterceptor(Tokens(tokens))]
        server = grpc.aio.server(interceptors=guards)
        pb_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
        infer = {"ModelInfer": grpc.unary_unary_rpc_method_handler(_echoed)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", infer)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await asyncio.wait_for(ask(channel), 30)
        finally:
            await server.stop(None)

    return asyncio.run(run())


async def _echoed(request: bytes, _: Any) -> bytes:
    return request


def of(name: str) -> Any:
    return [("authorization", f"Bearer token of {name}")]


async def error_of(call: Awaitable[Any]) -> Any:
    """Return the error that a call ends with; nothing where it is answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, address="here:1")
    return None


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    lines = [line_of(name, "viewer", f"token of {name}") for name in ("ann", "bob")]
    (tmp_path / "tokens").write_text("\n".join(lines))
    return tmp_path / "tokens"


def test_streams_count_until_they_end(tokens: Path) -> None:
    """A caller with as many streams as it may have is refused, another one is not; a stream left makes room."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        streams = [gateway.WatchRun(pb.WatchRunRequest(), metadata=of("ann")) for _ in range(2)]
        for stream in streams:
            await stream.read()
        refused = await error_of(gateway.GetVersion(pb.GetVersionRequest(), metadata=of("ann")))
        assert await error_of(gateway.GetVersion(pb.GetVersionRequest(), metadata=of("bob"))) is None
        streams[0].cancel()
        while await error_of(gateway.GetVersion(pb.GetVersionRequest(), metadata=of("ann"))):
            pass
        return refused

    refused = before_the_gateway(ask, RateLimits(calls_per_s=0, concurrent_calls=2), tokens)
    assert type(refused) is LimitExceeded
    assert "ann has 2 calls under way" in refused.message
    assert refused.retry_after_s == 1.0


@pytest.mark.parametrize(
    ("token", "refusal", "who"),
    [("nobody", Unauthenticated, r"127\.0\.0\.1"), ("ann", PermissionDenied, "ann")],
)
def test_calls_that_are_refused_count(tokens: Path, token: str, refusal: type[DefuseError], who: str) -> None:
    """By the name of the token or, where there is none of that kind, by the host; others are answered meanwhile."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        calls = [await error_of(gateway.CreateRun(pb.CreateRunRequest(), metadata=of(token))) for _ in range(2)]
        return *calls, await error_of(gateway.GetVersion(pb.GetVersionRequest(), metadata=of("bob")))

    first, second, of_another = before_the_gateway(ask, RateLimits(calls_per_s=0.01, concurrent_calls=0), tokens)
    assert type(first) is refusal
    assert type(second) is LimitExceeded
    assert re.match(f"{who} calls more than 0.01 times a second", second.message)
    assert of_another is None


def test_inference_does_not_count(tokens: Path) -> None:
    """However little a caller may call, it may infer."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answers = await asyncio.gather(*(infer(b"x", metadata=of("ann")) for _ in range(50)))
        calls = [await error_of(gateway.GetVersion(pb.GetVersionRequest(), metadata=of("ann"))) for _ in range(2)]
        return answers, calls

    answers, (first, second) = before_the_gateway(ask, RateLimits(calls_per_s=0.01, concurrent_calls=1), tokens)
    assert answers == [b"x"] * 50
    assert first is None
    assert type(second) is LimitExceeded


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.0.0.7:4711", "10.0.0.7"), ("ipv6:%5B::1%5D:4711", "::1"), ("ipv6:[fe80::1]:4711", "fe80::1")],
)
def test_a_caller_without_a_token_is_its_host(peer: str, host: str) -> None:
    """Connections of one host are one caller, whatever the port."""
    context: Any = type("Context", (), {"peer": lambda _: peer})()
    assert interceptors.caller_name(context) == host
