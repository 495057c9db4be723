import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from defuse.errors import Unavailable

from services.localstack import child_process
from services.localstack.child_process import ChildProcess, free_port
from tests.conftest import ROOT, eventually

Make = Callable[..., ChildProcess]
# Writes its group's members into a file once they run; the first never reacts to SIGTERM where it is told so.
FAMILY = """
import os, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".partial", "w") as file:
    file.write(f"{os.getpid()} {grandchild.pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(600)
"""
# Ends with 7, and a word, when it is asked to.
POLITE = """
import signal, sys
from pathlib import Path
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
Path(sys.argv[1]).write_text("up")
signal.sigwait({signal.SIGTERM})
Path(sys.argv[1]).write_text("bye")
sys.exit(7)
"""
PARENT = """
import sys, time
from pathlib import Path
from services.localstack.child_process import ChildProcess
child = ChildProcess(
    name="sleeper",
    command=[sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
    log=Path(sys.argv[1]),
    ready=lambda: "up" in Path(sys.argv[1]).read_text(),
)
child.start()
child.wait_ready(time.monotonic() + 30)
print(child.pid, flush=True)
time.sleep(600)
"""

# Searches for ports where the process of the test does.
TWENTY_PORTS = """
import os
from services.localstack.child_process import free_port
os.getpid = lambda: 7
print(*(free_port() for _ in range(20)))
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make children of Python code that are gone after the test, whatever happens."""
    with ExitStack() as stack:

        def child(code: str, *arguments: str, ready: Callable[[], bool] = lambda: True, **more: object) -> ChildProcess:
            made = ChildProcess(
                name="worker",
                command=[sys.executable, "-c", code, *arguments],
                log=tmp_path / "logs/worker.log",
                ready=ready,
                **more,  # type: ignore[arg-type]
            )
            stack.callback(made.stop, 0)
            return made

        yield child


def ends(pid: int) -> bool:
    """Wait until a process that may be somebody else's child has ended; False when it lives on."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 20)[0])
    finally:
        os.close(handle)


def family(make: Make, tmp_path: Path, *arguments: str) -> tuple[ChildProcess, list[int]]:
    """Start a child with a child of its own; return it with the ids of both."""
    pids = tmp_path / "pids"
    child = make(FAMILY, str(pids), *arguments, ready=pids.exists)
    child.start()
    child.wait_ready(time.monotonic() + 30)
    return child, [int(pid) for pid in pids.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed, and can do nothing any more, leaves no child behind."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    assert ends(pid)


def test_stop_ends_the_whole_group(make: Make, tmp_path: Path) -> None:
    """Stopping a process ends the processes that it started, too."""
    child, pids = family(make, tmp_path)
    assert pids[0] == child.pid
    child.stop(grace_s=10)
    assert not child.alive()
    assert all(ends(pid) for pid in pids)


def test_stop_ends_a_process_that_does_not_listen(make: Make, tmp_path: Path) -> None:
    """A process that ignores the request to end is ended after the grace."""
    child, pids = family(make, tmp_path, "deaf")
    child.stop(grace_s=0.1)
    assert child.process
    assert child.process.returncode == -signal.SIGKILL
    assert all(ends(pid) for pid in pids)


def test_stop_asks_first(make: Make, tmp_path: Path) -> None:
    """A process that ends by itself when asked has the time to do so."""
    note = tmp_path / "note"
    child = make(POLITE, str(note), ready=note.exists)
    child.start()
    child.wait_ready(time.monotonic() + 30)
    child.stop(grace_s=20)
    assert child.process
    assert (note.read_text(), child.process.returncode) == ("bye", 7)


def test_stop_of_what_was_never_started_or_has_ended(make: Make) -> None:
    """Stopping can be done at any time, and twice."""
    child = make("pass")
    child.stop(grace_s=1)
    child.start()
    assert child.process
    child.process.wait(30)
    child.stop(grace_s=1)
    child.stop(grace_s=1)
    assert not child.alive()


def test_what_ends_at_start_says_why(make: Make) -> None:
    """When a process ends before it is ready, the error carries the end of its log."""
    code = "import sys; print('\\n'.join(f'line {n}' for n in range(100))); sys.exit('no such model')"
    child = make(code, ready=lambda: False)
    child.start()
    with pytest.raises(Unavailable, match="worker ended at start") as caught:
        child.wait_ready(time.monotonic() + 30)
    assert "no such model" in caught.value.message
    assert "line 99" in caught.value.message
    assert "line 50" not in caught.value.message
    assert str(child.log) in caught.value.message


def test_what_takes_too_long_says_so(make: Make) -> None:
    """When a process is not ready in time, that is the error."""
    child = make("import time; time.sleep(600)", ready=lambda: False)
    child.start()
    with pytest.raises(Unavailable, match="worker is not ready in time"):
        child.wait_ready(time.monotonic() - 1)
    assert child.alive()


def test_variables_and_log(make: Make) -> None:
    """A child sees the variables that it was given, and what it writes is in its log, also after a restart."""
    child = make("import os; print(os.environ['DEFUSE_PLANTED'])", variables={"DEFUSE_PLANTED": "seen"})
    child.start()
    assert child.process
    child.process.wait(30)
    child.restart()
    child.process.wait(30)
    assert child.log.read_text() == "seen\nseen\n"


def test_niceness(make: Make) -> None:
    """A child gives way to others as far as it is told, beyond what its parent does, and so does its session."""
    child = make("import os, time; print(os.nice(0), flush=True); time.sleep(600)", niceness=7)
    child.start()
    eventually(lambda: child.log.read_text().endswith("\n"))
    niceness = min(19, os.nice(0) + 7)
    assert int(child.log.read_text()) == niceness
    session = Path(f"/proc/{child.pid}/autogroup")
    if session.exists():  # where the kernel shares out processors by sessions
        assert session.read_text().rstrip().endswith(f"nice {niceness}")


def test_restart_leaves_nothing_of_the_first(make: Make, tmp_path: Path) -> None:
    """A process that was killed is started again, after what it had started itself is gone."""
    child, pids = family(make, tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    assert child.process
    child.process.wait(30)
    child.restart()
    assert child.alive()
    assert child.pid != pids[0]
    assert ends(pids[1])


def test_free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two processes get the same port, and none is in the range of the system's own."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    here = [free_port() for _ in range(20)]
    there = subprocess.run([sys.executable, "-c", TWENTY_PORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    ports = [*here, *map(int, there.stdout.split())]
    assert len(set(ports)) == len(ports) == 40
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert 1024 <= min(ports) <= max(ports) < max(first, 32768)
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port with a listener is passed over."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(child_process, "_PORTS", range(taken, taken + 1))
        with pytest.raises(Unavailable, match=f"none of the ports {taken} to {taken} is free"):
            free_port()
