"""Fixtures of the contract suite: plain logs, the protos, a Triton of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from defuse.tls import TlsFiles

from services.corrector.triton_repository import TritonRepository
from services.localstack.child_process import free_port
from services.runtime.health import is_healthy
from services.runtime.telemetry import configure_logging
from services.triton.client import InferenceClient
from services.triton.transport import SYSTEM_SHARED_MEMORY
from tests.conftest import ROOT, eventually
from tests.restartable_triton import Served, restartable_triton, running_triton, shared_files


@pytest.fixture(autouse=True, scope="session")
def plain_logs() -> None:
    """Log as a service does; structlog's own default renders every traceback with all its variables."""
    configure_logging("contract", level="ERROR", log_format="json")


@pytest.fixture
def protos() -> Path:
    return Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="session")
def triton_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="session")
def inference(triton_root: Path) -> Iterator[InferenceClient]:
    """Start the Triton server of the wheel once, without models; give a client of it."""
    with running_triton(triton_root) as server:
        yield InferenceClient(server.address)


@pytest.fixture(scope="session")
def repository(triton_root: Path, inference: InferenceClient) -> TritonRepository:
    """Give the repository of that Triton server."""
    return TritonRepository(triton_root / "models", inference)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start a Triton of a file's own, which its tests may kill and start again."""
    with restartable_triton(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def own_files() -> Callable[[], list[str]]:
    """Give the names of the memory that this process shares, but for what clients of other tests hold."""
    before = set(shared_files())
    return lambda: [name for name in shared_files() if name not in before]


@pytest.fixture
def shared(served: Served) -> Iterator[InferenceClient]:
    """A client that shares memory with Triton, two requests in flight."""
    with closing(InferenceClient(served.address, in_flight=2, transport=SYSTEM_SHARED_MEMORY)) as client:
        yield client


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A gateway process of the suite's own."""

    address: str
    pid: int
    log: Path

    def memory_bytes(self) -> int:
        """Return what it holds in memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def gateway(served: Served, redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway before a Triton, without other services."""
    root, address = tmp_path_factory.mktemp("gateway"), f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "DEFUSE_PORT": address.rpartition(":")[2],
        "DEFUSE_REDIS_URL": redis_server,
        "DEFUSE_TRITON_URL": served.address,
        "DEFUSE_STORE_URL": f"file://{root}/store",
        "DEFUSE_SHARED_MEMORY": "true",
    }
    command = [sys.executable, "-m", "services.gateway"]
    path = root / "log"
    with path.open("w") as log, subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log) as process:
        try:
            eventually(lambda: is_healthy(address, TlsFiles()), alive=process)
            yield Gateway(address=address, pid=process.pid, log=path)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def door(gateway: Gateway) -> str:
    """The address of that gateway."""
    return gateway.address
