"""GeneratorService through the public door: a caller, a gateway's passage and a generator, each on a real port."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from defuse.errors import NotReady, Unavailable, from_rpc_error
from defuse.tls import TlsFiles
from defuse.v1 import generator_service_pb2 as pb
from defuse.v1 import generator_service_pb2_grpc as pb_grpc

from services.gateway.latent.proxy import GeneratorProxy
from services.localstack.child_process import free_port
from services.runtime.interceptors import ErrorInterceptor

Stub = Any  # whose types are those of a synchronous channel
Ask = Callable[[Stub], Awaitable[Any]]


class Generator(pb_grpc.GeneratorServiceServicer):
    """Answers with what it was asked, has no VAE, and sends failures until nobody listens any more."""

    Decode = None  # type: ignore[assignment]  # never asked

    def __init__(self) -> None:
        self.abandoned = asyncio.Event()
        self.seconds_left = 0.0

    async def Interpolate(self, request: pb.InterpolateRequest, context: Any) -> pb.InterpolateResponse:  # noqa: N802  # gRPC's name
        self.seconds_left = context.time_remaining()
        return pb.InterpolateResponse(predicted_labels=[request.frames])

    async def Estimate(self, request: pb.EstimateRequest, context: Any) -> pb.EstimateResponse:  # noqa: N802
        return pb.EstimateResponse()

    async def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:  # noqa: N802
        raise NotReady("the VAE is not trained yet", reason="NO_VAE")

    async def Identify(self, request: pb.IdentifyRequest, context: Any) -> AsyncIterator[pb.IdentifyResponse]:  # noqa: N802
        try:
            for shard in range(int(request.resume_token)):
                yield pb.IdentifyResponse(shard=shard, resume_token=request.run)
            if request.cancel_run:
                await asyncio.Event().wait()
            raise NotReady("the run failed", reason="RUN_FAILED")
        finally:
            self.abandoned.set()


def through_the_door(ask: Ask, generator: Generator | None = None, *, absent: bool = False) -> Any:
    """Serve a generator and a gateway that passes calls to it; return what `ask`, given the gateway, returns."""

    async def run() -> Any:
        after_cursor, front = (grpc.aio.server(interceptors=[ErrorInterceptor()]) for _ in range(2))
        port = free_port() if absent else after_cursor.add_insecure_port("127.0.0.1:0")
        proxy = GeneratorProxy(f"127.0.0.1:{port}", TlsFiles())
        pb_grpc.add_GeneratorServiceServicer_to_server(generator or Generator(), after_cursor)
        front.add_generic_rpc_handlers((proxy,))
        door = front.add_insecure_port("127.0.0.1:0")
        for server in (front,) if absent else (after_cursor, front):
            await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{door}") as channel:
                return await asyncio.wait_for(ask(pb_grpc.GeneratorServiceStub(channel)), 30)
        finally:
            await proxy.close()
            await front.stop(None)
            await after_cursor.stop(None)

    return asyncio.run(run())


def test_a_call_is_passed_through_with_its_deadline() -> None:
    """Question and answer of a unary call arrive as they were sent, and the generator knows how long it may take."""
    generator = Generator()

    async def ask(stub: Stub) -> Any:
        return await stub.Interpolate(pb.InterpolateRequest(frames=77), timeout=25)

    assert through_the_door(ask, generator).predicted_labels == [77]
    assert 0 < generator.seconds_left < 30


def test_an_error_is_passed_through_with_its_reason() -> None:
    """The generator's exception arrives as the same error, after earlier answers."""

    async def ask(stub: Stub) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Encode(pb.EncodeRequest())
        call = stub.Identify(pb.IdentifyRequest(run="runs/a", resume_token="3"))
        seen = [(answer.shard, answer.resume_token) for answer in [await call.read() for _ in range(3)]]
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            await call.read()
        return seen, [from_rpc_error(caught.value, address="here:1") for caught in (unary, stream)]

    seen, errors = through_the_door(ask)
    assert seen == [(0, "runs/a"), (1, "runs/a"), (2, "runs/a")]
    assert [(type(error), error.message, error.reason) for error in errors] == [
        (NotReady, "the VAE is not trained yet", "NO_VAE"),
        (NotReady, "the run failed", "RUN_FAILED"),
    ]


def test_a_caller_that_goes_away_ends_the_work_behind() -> None:
    """A stream that its caller cancels is cancelled at the generator too."""
    generator = Generator()

    async def ask(stub: Stub) -> Any:
        call = stub.Identify(pb.IdentifyRequest(resume_token="2", cancel_run=True))
        assert (await call.read()).shard == 0
        assert not generator.abandoned.is_set()
        call.cancel()
        return await generator.abandoned.wait()

    assert through_the_door(ask, generator)


def test_a_generator_that_is_not_there() -> None:
    """Without a generator every call is Unavailable, by its address."""

    async def ask(stub: Stub) -> Any:
        errors = []
        for call in (stub.Encode(pb.EncodeRequest()), stub.Identify(pb.IdentifyRequest()).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            errors.append(from_rpc_error(caught.value, address="here:1"))
        return errors

    for error in through_the_door(ask, absent=True):
        assert isinstance(error, Unavailable)
        assert "nothing answers at 127.0.0.1" in error.message


def test_other_services_are_not_its_business() -> None:
    """A method of another service, or one that is not offered, is left to others."""

    async def ask(_: Stub) -> Any:
        proxy = GeneratorProxy("127.0.0.1:1", TlsFiles())
        found = []
        for method in ("GeneratorService/Encode", "GeneratorService/Estimate", "GatewayService/GetRun"):
            details = type("Details", (), {"method": f"/defuse.v1.{method}", "invocation_metadata": ()})()
            found.append(proxy.service(details) is not None)
        await proxy.close()
        return found

    assert through_the_door(ask) == [True, False, False]
