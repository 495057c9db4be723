"""The audit of calls: a real server, callers with tokens, and an audit log in a real store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.errors import InvalidInput
from defuse.v1 import access_pb2, audit_pb2, generator_service_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from opentelemetry import trace

from services.gateway.access.interceptors import AccessInterceptor, RateLimitInterceptor, RateLimits
from services.gateway.audit.audit_log import AuditInterceptor, AuditLog, resource_names
from services.gateway.records.paging import Cursor
from services.gateway.tokens import Tokens, line_of
from services.runtime.interceptors import ErrorInterceptor
from services.storage.artifacts import ArtifactStore

GATEWAY = "defuse.v1.GatewayService"
IDENTIFY = "/defuse.v1.GeneratorService/Identify"
SPAN = trace.SpanContext(trace_id=0x0AF7651916CD43DD, span_id=0xB7AD, is_remote=False)


class Gateway(pb_grpc.GatewayServiceServicer):
    """Starts some runs, refuses others, and cancels none of them in time."""

    def __init__(self) -> None:
        self.cancelling = asyncio.Event()

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:  # noqa: N802  # gRPC's name
        if request.run_id == "bad":
            raise InvalidInput("no", reason="PLANTED")
        return pb.CreateRunResponse()

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:  # noqa: N802
        self.cancelling.set()
        await asyncio.Event().wait()
        return pb.CancelRunResponse()

    async def UploadFile(self, request_iterator: Any, context: Any) -> pb.UploadFileResponse:  # noqa: N802
        return pb.UploadFileResponse(size=sum([len(request.chunk) async for request in request_iterator]))

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802
        return pb.GetRunResponse()

    async def RollbackModel(self, request: pb.RollbackModelRequest, context: Any) -> pb.RollbackModelResponse:  # noqa: N802
        await context.abort(grpc.StatusCode.DATA_LOSS, "as somebody else said")
        return pb.RollbackModelResponse()


async def _identify(request: bytes, _: Any) -> AsyncIterator[bytes]:
    yield b""


async def _echoed(request: bytes, _: Any) -> bytes:
    return request


@pytest.fixture
def told(tmp_path: Path, store: ArtifactStore) -> Callable[..., list[audit_pb2.AuditEvent]]:
    """Give what serves the gateway to `ask` and returns what was kept, oldest first."""
    tokens = [line_of(role, role, f"token of {role}") for role in ("viewer", "admin")]
    (tmp_path / "tokens").write_text("\n".join(tokens))

    def kept() -> list[audit_pb2.AuditEvent]:
        return list(AuditLog(store).page(Cursor.of(pb.ListAuditEventsRequest())).entries)[::-1]

    def serve(ask: Any, *, calls_per_s: float = 0, events: int = 1) -> list[audit_pb2.AuditEvent]:
        async def run() -> None:
            guards = [
                ErrorInterceptor(),
                AuditInterceptor(AuditLog(store)),
                AccessInterceptor(Tokens(tmp_path / "tokens")),
                RateLimitInterceptor(RateLimits(calls_per_s=calls_per_s, concurrent_calls=0)),
            ]
            server, gateway = grpc.aio.server(interceptors=guards), Gateway()
            pb_grpc.add_GatewayServiceServicer_to_server(gateway, server)
            others: dict[str, Any] = {
                "inference.GRPCInferenceService": {"ModelInfer": grpc.unary_unary_rpc_method_handler(_echoed)},
                "defuse.v1.GeneratorService": {"Identify": grpc.unary_stream_rpc_method_handler(_identify)},
            }
            for name, methods in others.items():
                server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, methods)])
            port = server.add_insecure_port("127.0.0.1:0")
            with trace.use_span(trace.NonRecordingSpan(SPAN)):  # all calls are part of it
                await server.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    await asyncio.wait_for(ask(channel, gateway), 30)
                # Where a method ends a call itself, the caller hears of it before the event is kept.
                async with asyncio.timeout(30):
                    while len(kept()) < events:
                        await asyncio.sleep(0.01)
            finally:
                await server.stop(10)

        asyncio.run(run())
        return kept()

    return serve


def of(role: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer token of {role}")]}


async def ended(call: Awaitable[Any]) -> None:
    """Make a call, however it ends."""
    with suppress(grpc.aio.AioRpcError):
        await call


def run_request(run_id: str) -> pb.CreateRunRequest:
    return pb.CreateRunRequest(run_id=run_id, config={"model": "models/tiny", "dataset": "datasets/d1"})


def test_who_changed_what_and_how_it_ended(told: Any) -> None:
    """A call that is answered, one that is refused and one that a method aborts itself are kept, with all there is."""

    async def ask(channel: grpc.aio.Channel, _: Gateway) -> None:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        await gateway.CreateRun(run_request("first"), **of("admin"))
        await ended(gateway.CreateRun(run_request("bad"), **of("admin")))
        await ended(gateway.RollbackModel(pb.RollbackModelRequest(model="models/tiny", reason="so"), **of("admin")))

    first, bad, rollback = told(ask, events=3)
    assert (first.caller, first.role, first.method) == ("admin", access_pb2.ROLE_ADMIN, f"{GATEWAY}/CreateRun")
    assert list(first.resources) == ["runs/first", "models/tiny", "datasets/d1"]
    assert (first.code, first.reason) == ("OK", "")
    assert first.peer.startswith("ipv4:127.0.0.1:")
    assert first.trace_id == trace.format_trace_id(SPAN.trace_id)
    assert (bad.resources[0], bad.code, bad.reason) == ("runs/bad", "INVALID_ARGUMENT", "PLANTED")
    assert (list(rollback.resources), rollback.code) == (["models/tiny"], "DATA_LOSS")
    assert first.time.ToNanoseconds() <= bad.time.ToNanoseconds()


def test_a_stream_of_requests(told: Any) -> None:
    """An upload is named by its first message, and arrives unchanged."""

    async def ask(channel: grpc.aio.Channel, _: Gateway) -> None:
        messages = [pb.UploadFileRequest(digest="ab"), *[pb.UploadFileRequest(chunk=b"xyz")] * 3]
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        assert (await gateway.UploadFile(iter(messages), **of("admin"))).size == 9

    assert [list(event.resources) for event in told(ask)] == [["files/ab"]]


def test_a_caller_that_goes_away(told: Any) -> None:
    """The change may have happened all the same: the event is kept."""

    async def ask(channel: grpc.aio.Channel, gateway: Gateway) -> None:
        stub: Any = pb_grpc.GatewayServiceStub(channel)
        call = stub.CancelRun(pb.CancelRunRequest(name="runs/first"), **of("admin"))
        waiting = asyncio.ensure_future(call)
        await gateway.cancelling.wait()
        call.cancel()
        await asyncio.wait([waiting])

    [event] = told(ask)
    assert (event.code, list(event.resources)) == ("CANCELLED", ["runs/first"])


def test_who_may_not_is_in_the_log_alone(told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Strangers, callers whose role is too low, and calls beyond a limit fill no store; the log has what they asked."""

    async def ask(channel: grpc.aio.Channel, _: Gateway) -> None:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        await ended(gateway.CreateRun(run_request("of-nobody")))
        await ended(gateway.CreateRun(run_request("of-a-viewer"), **of("viewer")))
        for _ in range(2):
            await ended(gateway.CreateRun(run_request("twice"), **of("admin")))

    assert len(told(ask, calls_per_s=0.01)) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " audit " in line]
    assert len(lines) == 4
    for line, name, code in zip(
        lines,
        ("runs/of-nobody", "runs/of-a-viewer", "runs/twice", "runs/twice"),
        ("UNAUTHENTICATED", "PERMISSION_DENIED", "OK", "RESOURCE_EXHAUSTED"),
        strict=True,
    ):
        assert name in line
        assert code in line


def test_who_looks_changes_nothing(told: Any) -> None:
    """Neither reads nor inference are told, nor a stream of failures, unless it cancels its run at its end."""

    async def ask(channel: grpc.aio.Channel, _: Gateway) -> None:
        gateway: Any = pb_grpc.GatewayServiceStub(channel)
        await gateway.GetRun(pb.GetRunRequest(name="runs/first"), **of("viewer"))
        await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"", **of("viewer"))
        for cancel_run in (False, True):
            request = generator_service_pb2.IdentifyRequest(run="runs/first", cancel_run=cancel_run)
            async for _ in channel.unary_stream(IDENTIFY)(request.SerializeToString(), **of("admin")):
                pass

    assert [event.method for event in told(ask)] == [IDENTIFY.removeprefix("/")]


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (pb.AnnotateRegionRequest(annotation={"region": "runs/a/regions/r1", "label": "ant"}), ["runs/a/regions/r1"]),
        (pb.CreateDatasetRequest(file_digest="ab", display_name="runs"), ["files/ab"]),
        (pb.CreateDatasetRequest(uri="s3://models/x"), []),
        (b"bytes", []),
    ],
)
def test_the_names_in_a_request(request_: Any, names: list[str]) -> None:
    """Names of resources are found wherever they stand; other words are none."""
    assert list(resource_names(request_)) == names
