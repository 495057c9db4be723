"""A gateway of its own under more than it should have to bear: large messages, many calls, idle connections."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from defuse import Client, InvalidInput, LimitExceeded
from defuse.connection import Connection
from defuse.v1 import gateway_service_pb2 as pb

from services.localstack.child_process import free_port
from tests.conftest import ROOT, eventually

# What an HTTP/2 client begins with: the preface, and settings that change nothing.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
IDLE = 1000


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A gateway before no Redis and no Triton, that may open few files at first; give its address and process id."""
    root, port = tmp_path_factory.mktemp("gateway"), free_port()
    environment = {
        **os.environ,
        "DEFUSE_PORT": str(port),
        "DEFUSE_MAX_CALLS_PER_S": "10",
        "DEFUSE_MAX_MESSAGE_BYTES": "65536",
        "DEFUSE_REDIS_URL": "redis://127.0.0.1:9/0",
        "DEFUSE_TRITON_URL": "127.0.0.1:9",
        "DEFUSE_STORE_URL": f"file://{root}/store",
    }
    few = "ulimit -Sn 256 && exec " + sys.executable + " -m services.gateway"
    with (
        (root / "log").open("w") as log,
        subprocess.Popen(["sh", "-c", few], env=environment, cwd=ROOT, stderr=log) as it,
    ):
        eventually(lambda: "listening" in (root / "log").read_text(), alive=it)
        yield f"127.0.0.1:{port}", it.pid
        it.kill()


def test_a_message_that_is_too_large(door: tuple[str, int]) -> None:
    """It is refused by its size and the limit, and the next one is answered."""
    address, _ = door
    with contextlib.closing(Connection(address, timeout_s=30)) as connection:
        with pytest.raises(InvalidInput, match=r"larger than max \(\d+ vs\. 65536\); send less at once") as refused:
            connection.call("GetRun", pb.GetRunRequest(name="x" * 70_000))
        assert refused.value.reason == "MESSAGE_TOO_LARGE"
        assert connection.call("GetVersion", pb.GetVersionRequest()).version


def test_more_calls_than_a_caller_may_make(door: tuple[str, int]) -> None:
    """Calls beyond the rate are rejected with the time of a retry; the retry is answered."""
    address, _ = door
    with Client(address) as client:
        with pytest.raises(LimitExceeded, match=r"127\.0\.0\.1 calls more than 10 times a second") as refused:
            [client.version() for _ in range(10_000)]
        assert refused.value.retry_after_s is not None
        assert 0 < refused.value.retry_after_s < 1

        def answered() -> bool:
            with contextlib.suppress(LimitExceeded):
                return bool(client.version())
            return False

        eventually(answered)


def test_a_thousand_idle_connections(door: tuple[str, int]) -> None:
    """A new caller is answered beside them, though the gateway was started with room for few."""
    address, pid = door
    host, _, port = address.partition(":")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            idle.sendall(HELLO)
            assert idle.recv(9)  # the gateway's own settings: it has taken the connection on
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) > IDLE
        with Client(address, timeout_s=30) as client:
            assert client.version()
