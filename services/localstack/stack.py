"""The local stack: Redis, Triton and the services on this machine.

By default all of them are child processes on free ports.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Self

from defuse.errors import Conflict
from defuse.tls import TlsFiles
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.localstack.child_process import ChildProcess, free_port
from services.localstack.servers import Server, ensure_triton, start_redis, start_triton
from services.runtime.health import is_healthy

SERVICES = ("corrector", "distiller", "generator", "gateway")
_READY_S = 120.0
_GRACE_S = 15.0
_WATCH_S = 0.5
# Niceness of the services that work on runs and corrections: inference traffic has priority on shared processors.
_NICENESS = 5
Say = Callable[[str], None]


class StackSettings(BaseSettings):
    """Settings of the local stack.

    All other settings are passed on to the services.
    """

    model_config = SettingsConfigDict(env_prefix="DEFUSE_", extra="ignore", frozen=True)

    home: Path = Field(Path.home() / ".defuse", description="Directory of the stack's data and logs.")
    cache: Path = Field(
        Path.home() / ".cache" / "defuse", description="Directory of cached installations and trained models."
    )
    redis_url: str | None = Field(None, description="A Redis server to use instead of starting one.")
    triton_url: str | None = Field(None, description="HOST:PORT of a Triton server to use instead of starting one.")
    triton_repository: Path | None = Field(
        None,
        description="Model repository of that Triton; without it releases are handed over in `DEFUSE_HOME/handover`.",
    )
    gateway_port: int = Field(0, ge=0, le=65535, description="Port of the gateway; 0 takes a free one.")
    generators: int = Field(1, ge=1, description="How many generators to start.")
    correctors: int = Field(1, ge=1, description="How many correctors to start: they share the trainings of a sweep.")


class LocalStack:
    """Starts all processes, restarts dead ones, and stops all."""

    def __init__(self, settings: StackSettings, say: Say) -> None:
        self._settings = settings
        self._home = settings.home.expanduser().resolve()
        self._say = say
        self._children: list[ChildProcess] = []
        self._addresses: dict[str, str] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self._lock = _lock_directory(self._home)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def gateway(self) -> str:
        return self._addresses["gateway"]

    @property
    def logs(self) -> Path:
        return self._home / "logs"

    def addresses(self) -> Mapping[str, str]:
        """Return HOST:PORT of every server, by name."""
        return dict(self._addresses)

    def watch(self) -> None:
        """Restart dead processes, without end.

        It raises the error of a process that cannot be started at all.
        """
        while True:
            for child in self._children:
                if not child.alive():
                    self._say(f"{child.name} ended; starting it again (log: {child.log})")
                    child.restart()
                    self._write_state()
            time.sleep(_WATCH_S)

    def stop(self) -> None:
        """Stop all processes, callers before the services that they call."""
        for child in reversed(self._children):
            child.stop(_GRACE_S)
        self._children.clear()
        self._state_file.unlink(missing_ok=True)
        if self._lock:
            self._lock.close()

    def _start(self) -> None:
        deadline = time.monotonic() + _READY_S
        variables = {"DEFUSE_STORE_URL": f"file://{self._home / 'store'}", "DEFUSE_LOG_FORMAT": "json"}
        variables["DEFUSE_REDIS_URL"] = self._settings.redis_url or self._start_redis()
        if self._settings.triton_url:
            variables |= self._given_triton(self._settings.triton_url)
        else:
            variables |= self._start_triton()
            deadline = time.monotonic() + _READY_S  # installation time does not count
        # Services start while their servers still start, and wait for them by themselves.
        for name in SERVICES:
            count = {"generator": self._settings.generators, "corrector": self._settings.correctors}.get(name, 1)
            for number in range(1, count + 1):
                self._start_service(name, number, variables)
        for child in self._children:
            child.wait_ready(deadline)
        self._write_state()

    def _start_redis(self) -> str:
        server = start_redis(self._home / "redis", log=self.logs / "redis.log")
        self._add("redis", server)
        return f"redis://{server.address}/0"

    def _given_triton(self, url: str) -> dict[str, str]:
        """Return the services' settings for an existing Triton.

        Without a repository, Triton is an external one.
        """
        if self._settings.triton_repository:
            return {"DEFUSE_TRITON_URL": url, "DEFUSE_TRITON_REPOSITORY": str(self._settings.triton_repository)}
        return {"DEFUSE_TRITON_URL": url, "DEFUSE_HANDOVER": str(self._home / "handover")}

    def _start_triton(self) -> dict[str, str]:
        wheel = ensure_triton(self._settings.cache.expanduser(), self._say)
        repository = self._home / "models"
        server = start_triton(
            wheel, repository=repository, backends=self._home / "triton-backends", log=self.logs / "triton.log"
        )
        self._add("triton", server)
        return {"DEFUSE_TRITON_URL": server.address, "DEFUSE_TRITON_REPOSITORY": str(repository)}

    def _start_service(self, name: str, number: int, variables: dict[str, str]) -> None:
        port = (name == "gateway" and self._settings.gateway_port) or free_port()
        address = f"127.0.0.1:{port}"
        label = name if number == 1 else f"{name}-{number}"
        own = {"DEFUSE_PORT": str(port), "DEFUSE_METRICS_PORT": str(free_port())}
        if name == "gateway":
            own["DEFUSE_HTTP_PORT"] = str(free_port())
            self._addresses["gateway-http"] = f"127.0.0.1:{own['DEFUSE_HTTP_PORT']}"
        if name == "gateway" and not self._settings.triton_url:
            own["DEFUSE_SHARED_MEMORY"] = (
                "true"  # Triton and all its possible callers belong to this user, on this host
            )
        child = ChildProcess(
            name=label,
            command=[sys.executable, "-m", f"services.{name}"],
            variables={**variables, **own},
            niceness=0 if name == "gateway" else _NICENESS,
            log=self.logs / f"{label}.log",
            ready=lambda: is_healthy(address, TlsFiles()),
        )
        child.start()
        self._add(label, Server(child=child, address=address))
        variables[f"DEFUSE_{name.upper()}_URL"] = address

    def _add(self, name: str, server: Server) -> None:
        self._children.append(server.child)
        self._addresses[name] = server.address

    @property
    def _state_file(self) -> Path:
        return self._home / "stack.json"

    def _write_state(self) -> None:
        """Write the stack's addresses to a file for clients on this machine."""
        state = {
            "pid": os.getpid(),
            "addresses": self._addresses,
            "pids": {child.name: child.pid for child in self._children},
            "logs": str(self.logs),
        }
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps(state, indent=2))
        partial.replace(self._state_file)


def _lock_directory(home: Path) -> IO[str]:
    """Lock a directory so that only one stack uses it.

    Raises Conflict when another stack uses it.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = (home / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise Conflict(f"another stack uses {home}; stop it, or set DEFUSE_HOME to another directory") from error
    return lock
