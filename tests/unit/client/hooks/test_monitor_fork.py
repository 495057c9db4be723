"""Monitors in forked programs: parent and child report their own observations."""

import subprocess
import sys

import pytest

from tests.unit.client.hooks.servers import Gateway

PROGRAM = """
import os, time
from defuse.hooks import Monitor
monitor = Monitor({address!r}, token="")
if {before}:
    monitor.log("tiny", b"abcd", [1, 2, 3], id="of the parent")
    while not monitor.counts.stored:
        time.sleep(0.05)
    monitor.log("tiny", b"abcd", [1, 2, 3], id="of the parent, waiting")
child = os.fork()
if not child:
    assert monitor.counts.seen == 0
    for number in range(3):
        monitor.log("tiny", b"abcd", [1, 2, 3], id=f"of the child {{number}}")
        monitor.log("tiny", b"abcd", [1, 2, 3])
    monitor.close(30)
    assert monitor.counts.stored == 6, monitor.counts
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
monitor.log("tiny", b"abcd", [1, 2, 3])
monitor.close(30)
assert monitor.counts.stored == monitor.counts.seen, monitor.counts
"""


@pytest.mark.parametrize("before", [False, True])
def test_child_restarts(gateway: Gateway, before: bool) -> None:
    """Nothing is reported twice or mixed up."""
    program = PROGRAM.format(address=gateway.address, before=before)
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(gateway.stored) == (9 if before else 7)
    assert {f"of the child {number}" for number in range(3)} <= set(gateway.stored)
