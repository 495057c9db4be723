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
from defuse.client import run_call
from defuse.connection import Connection, find_gateway
from defuse.errors import DeadlineExceeded, NotFound, Unavailable, to_status
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status

from services.runtime.processes import free_port
from tests.unit.client.gateway_server import connected

Context = grpc.ServicerContext


class Gateway(pb_grpc.GatewayServiceServicer):
    """A gateway that keeps files in memory, and whose Redis is away when a run is watched for the first time."""

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
            context.abort_with_status(rpc_status.to_status(to_status(Unavailable("Redis does not answer"))))


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def connection(gateway: Gateway) -> Iterator[Connection]:
    """Serve that gateway; give a connection to it."""
    with connected(gateway) as found:
        yield found
        gateway.over.set()


def test_a_stream_goes_on_after_an_absence(connection: Connection, gateway: Gateway) -> None:
    """While a server that the gateway needs is away, a stream is asked for again, and the caller sees one stream."""
    answers = connection.watch("WatchRun", pb.WatchRunRequest(name="runs/a"), 30)
    assert [answer.run.note for answer in answers] == ["1", "2"]


@pytest.mark.parametrize("timeout_s", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("there", [True, False])
def test_a_stream_ends_when_the_caller_has_waited_long_enough(
    connection: Connection, timeout_s: float, there: bool
) -> None:
    """When the time is over it is the same error, whether the gateway takes too long or never came back."""
    asked = connection if there else Connection(f"127.0.0.1:{free_port()}", timeout_s=10)
    with pytest.raises(DeadlineExceeded, match=f"WatchRun had not ended after {timeout_s:g} s .*wait longer"):
        list(asked.watch("WatchRun", pb.WatchRunRequest(name="runs/endless"), timeout_s))
    asked.close()


@pytest.mark.parametrize("send", ["bytes", "file"])
def test_a_file_is_sent_once(connection: Connection, gateway: Gateway, tmp_path: Path, send: str) -> None:
    """A file arrives whole under its digest, and what the gateway has already is not sent again."""
    content = os.urandom(2 * CHUNK_BYTES + 7)
    (tmp_path / "file").write_bytes(content)
    told: list[tuple[int, int]] = []
    ways: dict[str, Callable[[], str]] = {
        "bytes": lambda: run_call(connection, upload_bytes(content)),
        "file": lambda: run_call(connection, upload_file(tmp_path / "file", lambda *progress: told.append(progress))),
    }
    digest = hashlib.sha256(content).hexdigest()
    assert [ways[send](), ways[send]()] == [digest, digest]
    assert (gateway.files, gateway.uploads) == ({digest: content}, 1)
    if send == "file":
        assert told[-1] == (len(content), len(content))


def test_where_the_gateway_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable says it, else the local stack of this user; without both, what to do is said."""
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
