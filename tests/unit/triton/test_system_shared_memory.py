"""Files in /dev/shm: whose they are, and that none is left."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.triton.system_shared_memory import DIRECTORY, RegionFile, remove_orphans

MAKE_A_REGION = """
from services.triton.system_shared_memory import RegionFile
region = RegionFile(4096)
print("ready", flush=True)
input()
"""


@pytest.fixture
def new_files() -> Callable[[], list[str]]:
    """Give the names of this process's regions, but for what clients of other tests hold."""
    before = files(os.getpid())
    return lambda: [name for name in files(os.getpid()) if name not in before]


def files(pid: int) -> list[str]:
    return sorted(path.name for path in DIRECTORY.glob(f"defuse-{pid}-*"))


def test_a_region_is_a_file_with_the_process_in_its_name(new_files: Callable[[], list[str]]) -> None:
    """Bytes written through the mapping are in a private file of that size, until it is removed."""
    region = RegionFile(8192)
    path = DIRECTORY / region.name
    np.frombuffer(region.buffer, np.uint8)[:] = 7
    assert new_files() == [region.name]
    assert path.read_bytes() == bytes([7]) * 8192
    assert path.stat().st_mode & 0o777 == 0o600
    region.remove()
    assert new_files() == []
    region.remove()


def test_what_was_mapped_outlives_its_name() -> None:
    """An array on a removed region stays valid: an answer may still be copied from it."""
    region = RegionFile(4096)
    array = np.frombuffer(region.buffer, np.uint8)
    array[:] = 3
    region.remove()
    del region
    assert array.sum() == 3 * 4096


def test_more_than_there_is_leaves_nothing(new_files: Callable[[], list[str]]) -> None:
    """A region beyond what /dev/shm has is refused when it is made, not when it is written, and leaves no file."""
    with pytest.raises(OSError, match="space"):
        RegionFile(1 << 50)
    assert new_files() == []


def test_orphans_are_removed_and_nothing_else(new_files: Callable[[], list[str]]) -> None:
    """Of a killed process every region goes; those of living processes and other people's files stay."""
    mine, foreign = RegionFile(4096), DIRECTORY / f"other-{os.getpid()}"
    foreign.touch()
    with owner() as killed, owner() as living:
        end(killed)
        remove_orphans()
        assert (files(killed.pid), len(files(living.pid))) == ([], 1)
        assert (new_files(), foreign.exists()) == ([mine.name], True)
        end(living)
    mine.remove()
    foreign.unlink()
    remove_orphans()
    assert files(living.pid) == []


def owner() -> "subprocess.Popen[str]":
    """Start a process that has a region."""
    command = [sys.executable, "-c", MAKE_A_REGION]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout
    process.stdout.readline()
    assert len(files(process.pid)) == 1
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
