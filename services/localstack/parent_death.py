"""Start a program that the kernel ends with its parent.

The command is `python parent_death.py NICENESS PROGRAM ARGUMENT...`. It is a program of its own because the parent has
threads, and a process with threads must not run Python between fork and exec.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Request the signal, set the niceness, then replace this program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    niceness, program, *arguments = sys.argv[1:]
    _set_niceness(int(niceness))
    os.execvp(program, [program, *arguments])  # noqa: S606  # that is the point


def _set_niceness(niceness: int) -> None:
    """Set the niceness, for the process and its scheduling session."""
    os.nice(niceness)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:  # noqa: PTH123  # starts sooner
        group.write(str(os.nice(0)))


if __name__ == "__main__":
    main()
