"""Become another program that the kernel ends when the parent dies: `python tether.py NICENESS PROGRAM ARGUMENT...`.

A program of its own, because the parent has threads, and a process with threads must not run Python between fork and
exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, give way to others as told, then replace this program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    niceness, program, *arguments = sys.argv[1:]
    os.nice(int(niceness))
    os.execvp(program, [program, *arguments])  # noqa: S606  # that is the point


if __name__ == "__main__":
    main()
