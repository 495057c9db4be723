"""Child processes that end with their parent and can be restarted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from defuse.errors import Unavailable

_PARENT_DEATH = str(Path(__file__).with_name("parent_death.py"))
_POLL_S = 0.1
_LOG_TAIL = 15
# Below the ports that Linux gives to connections by itself: one of those could be gone before a server listens on it,
# or while the server is started again.
_PORTS = range(15_000, 30_000)
# Where the search begins depends on the process, so that those that start together seldom ask for the same port.
_PORTS_OF_PROCESS = 64


@dataclass(kw_only=True)
class ChildProcess:
    """A process of the local stack, which can be restarted."""

    name: str
    command: Sequence[str]
    log: Path
    # Returns whether the process is ready.
    ready: Callable[[], bool]
    variables: Mapping[str, str] = field(default_factory=dict)
    # Niceness, 0 to 19: how far the process yields the processor to others.
    niceness: int = 0
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A process group of its own lets `stop` reach the child's children, too.
            self.process = subprocess.Popen(
                [sys.executable, "-SE", _PARENT_DEATH, str(self.niceness), *self.command],
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def restart(self) -> None:
        """Start a dead process again, after its remaining children are killed."""
        self._end_group()
        self.start()

    def wait_ready(self, deadline: float) -> None:
        """Wait until the process is ready.

        Raises Unavailable with the end of its log when it ends or is not ready in time.
        """
        while not self.ready():
            if not self.alive():
                raise Unavailable(f"{self.name} ended at start; the end of {self.log}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} is not ready in time; the end of {self.log}:\n{self._tail()}")
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def stop(self, grace_s: float) -> None:
        """Terminate the process, and kill it after `grace_s` seconds."""
        if not self.process:
            return
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._end_group()
        self.process.wait()

    def _end_group(self) -> None:
        """Kill the remaining processes of the process's group.

        Stubs of a killed server are an example.
        """
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-_LOG_TAIL:])


def free_port() -> int:
    """Return a free port, reserved for the lifetime of this process.

    No other caller of this function gets the port meanwhile.
    """
    count = len(_PORTS)
    for number in range(count):
        port = _PORTS[(os.getpid() * _PORTS_OF_PROCESS + number) % count]
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0defuse-port-{port}")  # abstract: of this network alone, gone with the process
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        reservation.detach()
        return port
    raise Unavailable(f"none of the ports {_PORTS.start} to {_PORTS.stop - 1} is free")
