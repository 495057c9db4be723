"""What the contracts are checked on: plain logs, the protos, a Triton of the suite's own."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.corrector.repository import TritonRepository
from services.runtime.inference import InferenceClient
from services.runtime.telemetry import configure_logging
from services.runtime.transport import SYSTEM_SHARED_MEMORY
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
