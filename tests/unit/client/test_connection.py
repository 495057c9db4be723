"""Streams, uploads and the address of the gateway, with a fake gateway."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.calls.uploads import CHUNK_BYTES, upload_bytes, upload_file
from defuse.client import execute_call
from defuse.connection import Connection, find_gateway
from defuse.errors import DeadlineExceeded, NotFound, Unavailable, to_status
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status

from services.localstack.child_process import free_port
from tests.unit.client.gateway_server import connected

Context = grpc.ServicerContext


class Gateway(pb_grpc.GatewayServiceServicer):
    """Keeps files in memory, and breaks the first stream of a run."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.uploads = 0
        self.watches = 0
        self.over = threading.Event()

    def GetFile(self, request: pb.GetFileRequest, context: Context) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        if request.digest not in self.files:
            context.abort_with_status(rpc_status.to_status(to_status(NotFound("no such file"))))
        return pb.GetFileResponse()

    def UploadFile(self, requests: Iterator[pb.UploadFileRequest], context: Context) -> pb.UploadFileResponse:  # noqa: N802
        digest = next(requests).digest
        self.files[digest] = b"".join(request.chunk for request in requests)
        self.uploads += 1
        return pb.UploadFileResponse()

    def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> Iterator[pb.WatchRunResponse]:  # noqa: N802
        self.watches += 1
        if request.name == "runs/endless":
            self.over.wait()
            return
        yield pb.WatchRunResponse(run={"name": request.name, "note": str(self.watches)})
        if self.watches == 1:
            context.abort_with_status(rpc_status.to_status(to_status(Unavailable("Redis does not response"))))


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def connection(gateway: Gateway) -> Iterator[Connection]:
    """Serve the fake gateway; provide a connection to it."""
    with connected(gateway) as found:
        yield found
        gateway.over.set()


def test_stream_reconnects(connection: Connection, gateway: Gateway) -> None:
    """A broken stream is requested again; the reader sees one stream."""
    responses = connection.watch("WatchRun", pb.WatchRunRequest(name="runs/a"), 30)
    assert [response.run.note for response in responses] == ["1", "2"]


@pytest.mark.parametrize("timeout_s", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("there", [True, False])
def test_stream_timeout(connection: Connection, timeout_s: float, there: bool) -> None:
    """A slow and an absent gateway give the same error."""
    target = connection if there else Connection(f"127.0.0.1:{free_port()}", timeout_s=10)
    with pytest.raises(DeadlineExceeded, match=f"WatchRun had not ended after {timeout_s:g} s .*wait longer"):
        list(target.watch("WatchRun", pb.WatchRunRequest(name="runs/endless"), timeout_s))
    target.close()


@pytest.mark.parametrize("send", ["bytes", "file"])
def test_upload_once(connection: Connection, gateway: Gateway, tmp_path: Path, send: str) -> None:
    """A file arrives complete under its digest.

    A known digest is not uploaded again.
    """
    content = os.urandom(2 * CHUNK_BYTES + 7)
    (tmp_path / "file").write_bytes(content)
    progress_calls: list[tuple[int, int]] = []
    ways: dict[str, Callable[[], str]] = {
        "bytes": lambda: execute_call(connection, upload_bytes(content)),
        "file": lambda: execute_call(
            connection, upload_file(tmp_path / "file", lambda *progress: progress_calls.append(progress))
        ),
    }
    digest = hashlib.sha256(content).hexdigest()
    assert [ways[send](), ways[send]()] == [digest, digest]
    assert (gateway.files, gateway.uploads) == ({digest: content}, 1)
    if send == "file":
        assert progress_calls[-1] == (len(content), len(content))


def test_find_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable precedes the local stack; the error names the remedy."""
    monkeypatch.delenv("DEFUSE_GATEWAY", raising=False)
    monkeypatch.setenv("DEFUSE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=rf"{tmp_path}.*defuse up") as caught:
        find_gateway()
    assert caught.value.reason == "NO_GATEWAY"
    state: dict[str, Any] = {"addresses": {"gateway": "127.0.0.1:1"}}
    (tmp_path / "stack.json").write_text(json.dumps(state))
    assert find_gateway() == "127.0.0.1:1"
    monkeypatch.setenv("DEFUSE_GATEWAY", "elsewhere:2")
    assert find_gateway() == "elsewhere:2"
