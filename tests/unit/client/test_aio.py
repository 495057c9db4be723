"""The client on an event loop, with a fake gateway."""

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from defuse import DefuseError, InvalidInput, NotFound, NotReady, Preprocessing, aio, connection, tensors
from defuse.calls.uploads import CHUNK_BYTES
from defuse.errors import DeadlineExceeded, Unavailable, to_status
from defuse.v1 import failure_pb2, generator_service_pb2, generator_service_pb2_grpc
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status

from services.localstack.child_process import free_port

Scenario = Callable[[aio.Client], Awaitable[None]]
COUNT = 5
TIMEOUT_S = 30


def refuse(context: Any, error: DefuseError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class Gateway(pb_grpc.GatewayServiceServicer):
    """Keeps files, lists two runs per page, breaks the first stream."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ids: list[str] = []
        self.watches = 0
        self.cancelled = threading.Event()

    def GetFile(self, request: pb.GetFileRequest, context: Any) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        if request.digest not in self.files:
            refuse(context, NotFound("no such file"))
        return pb.GetFileResponse()

    def UploadFile(self, requests: Iterator[pb.UploadFileRequest], context: Any) -> pb.UploadFileResponse:  # noqa: N802
        digest = next(requests).digest
        self.files[digest] = b"".join(request.chunk for request in requests)
        return pb.UploadFileResponse()

    def CreateModel(self, request: pb.CreateModelRequest, context: Any) -> pb.CreateModelResponse:  # noqa: N802
        self.ids.append(request.request_id)
        return pb.CreateModelResponse(model=request.model)

    def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:  # noqa: N802
        begin = int(request.page_token or 0)
        runs = [{"name": f"runs/r{number}"} for number in range(begin, min(begin + 2, COUNT))]
        return pb.ListRunsResponse(runs=runs, next_page_token=str(begin + 2) if begin + 2 < COUNT else "")

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Iterator[pb.WatchRunResponse]:  # noqa: N802
        self.watches += 1
        yield pb.WatchRunResponse(run={"name": request.name, "note": str(self.watches)})
        if request.name == "runs/endless":
            self.cancelled.wait(TIMEOUT_S)
        elif self.watches == 1:
            refuse(context, Unavailable("Redis does not answer"))

    def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:  # noqa: N802
        if request.name == "runs/unstoppable":
            refuse(context, NotReady("there is no stopping it", reason="PLANTED"))
        self.cancelled.set()
        return pb.CancelRunResponse(run={"name": request.name})


class Generator(generator_service_pb2_grpc.GeneratorServiceServicer):
    """Sends one failure per batch; its latents are pixels."""

    def Identify(  # noqa: N802
        self, request: generator_service_pb2.IdentifyRequest, context: Any
    ) -> Iterator[generator_service_pb2.IdentifyResponse]:
        for number in range(int(request.resume_token or 0), COUNT):
            yield generator_service_pb2.IdentifyResponse(
                failures=[failure_pb2.Failure(source=number, latent=[0.0])], resume_token=str(number + 1)
            )

    def Encode(  # noqa: N802
        self, request: generator_service_pb2.EncodeRequest, context: Any
    ) -> generator_service_pb2.EncodeResponse:
        pixels = tensors.images_from_proto(request.images).astype(np.float32).reshape(request.images.shape[0], -1)
        floats = tensors.floats_to_proto(pixels)
        return generator_service_pb2.EncodeResponse(mu=floats, sigma=floats)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def run_scenario(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Scenario], None]]:
    """Run a coroutine function with a client of the fake gateway."""
    monkeypatch.setattr(connection, "_RECONNECT_S", 0.0)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(Generator(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    def execute(scenario: Scenario) -> None:
        async def run() -> None:
            async with aio.Client(f"127.0.0.1:{port}") as client:
                await asyncio.wait_for(scenario(client), TIMEOUT_S)

        asyncio.run(run())

    yield execute
    gateway.cancelled.set()
    server.stop(None).wait()


def test_concurrent_calls(run_scenario: Callable[[Scenario], None]) -> None:
    """Concurrent calls return the entries of all pages."""

    async def scenario(client: aio.Client) -> None:
        lists = await asyncio.gather(client.runs(), client.runs())
        assert [[run.id for run in runs] for runs in lists] == [[f"r{number}" for number in range(COUNT)]] * 2

    run_scenario(scenario)


def test_upload(run_scenario: Callable[[Scenario], None], gateway: Gateway, tmp_path: Path) -> None:
    """A file is uploaded in chunks, once.

    Each create has its own request id.
    """
    content = bytes(2 * CHUNK_BYTES + 7)
    (tmp_path / "tiny.onnx").write_bytes(content)

    async def scenario(client: aio.Client) -> None:
        for _ in range(2):
            model = await client.add_model("tiny", tmp_path / "tiny.onnx", ["ant", "bee"], Preprocessing())
            assert model.id == "tiny"
        with pytest.raises(InvalidInput, match="cannot read"):
            await client.add_model("tiny", tmp_path / "missing", ["ant", "bee"])

    run_scenario(scenario)
    assert gateway.files == {hashlib.sha256(content).hexdigest(): content}
    assert [len(request_id) for request_id in gateway.ids] == [36, 36]
    assert len(set(gateway.ids)) == 2


def test_stream_reconnects(run_scenario: Callable[[Scenario], None]) -> None:
    """Waiting and reading see one stream, although it broke."""

    async def scenario(client: aio.Client) -> None:
        notes: list[str] = []
        assert (await client.wait_for_run("a", on_change=lambda run: notes.append(run.note))).note == "2"
        assert notes == ["1", "2"]
        assert [run.note async for run in client.watch_run("a")] == ["3"]

    run_scenario(scenario)


@pytest.mark.parametrize("there", [True, False])
def test_stream_timeout(run_scenario: Callable[[Scenario], None], there: bool) -> None:
    """A slow and an absent gateway give the same error."""

    async def scenario(client: aio.Client) -> None:
        async with aio.Client(f"127.0.0.1:{free_port()}") as nobody:
            target = client if there else nobody
            with pytest.raises(DeadlineExceeded, match=r"WatchRun had not ended after 0.3 s"):
                await target.wait_for_run("endless", timeout_s=0.3)

    run_scenario(scenario)


def test_failures(run_scenario: Callable[[Scenario], None], gateway: Gateway) -> None:
    """The stream resumes at any token.

    A reader that stops can cancel the run.
    """

    async def scenario(client: aio.Client) -> None:
        assert [batch.failures[0].source async for batch in client.failures("a", resume_token="3")] == [3, 4]
        async with aclosing(client.failures("a")) as batches:
            await anext(batches)
        assert not gateway.cancelled.is_set()
        async with aclosing(client.failures("a", cancel_run=True)) as batches:
            await anext(batches)
        assert gateway.cancelled.is_set()

    run_scenario(scenario)


def test_cancelled_task(run_scenario: Callable[[Scenario], None]) -> None:
    """A waiting task can be cancelled."""

    async def scenario(client: aio.Client) -> None:
        waiting = asyncio.create_task(client.wait_for_run("endless"))
        await asyncio.wait([waiting], timeout=0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run_scenario(scenario)


def test_latent_space(run_scenario: Callable[[Scenario], None]) -> None:
    """Arrays go in and out."""

    async def scenario(client: aio.Client) -> None:
        images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
        mu, _ = await client.latent_space("first").encode(images)
        np.testing.assert_allclose(mu, images.reshape(3, 4))

    run_scenario(scenario)


def test_errors(run_scenario: Callable[[Scenario], None]) -> None:
    """Errors keep class and reason; Unavailable names an absent gateway."""

    async def scenario(client: aio.Client) -> None:
        with pytest.raises(NotReady, match="there is no stopping") as caught:
            await client.cancel_run("unstoppable")
        assert caught.value.reason == "PLANTED"
        async with aio.Client(f"127.0.0.1:{free_port()}") as nobody:
            with pytest.raises(Unavailable, match=nobody.address):
                await nobody.version()

    run_scenario(scenario)
