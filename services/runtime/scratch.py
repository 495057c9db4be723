"""Temporary files for data sets, which may be larger than memory."""

import tempfile
from typing import IO

from services.runtime.full_disk import naming_the_full_disk


def scratch_file() -> IO[bytes]:
    """Open a temporary file that is gone when it is closed; fill it with `append`."""
    # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
    return tempfile.TemporaryFile(prefix="defuse-", buffering=0)


def append(file: IO[bytes], chunk: bytes) -> None:
    """Write a whole chunk; raise StoreFull where there is no room for it."""
    rest = memoryview(chunk)
    with naming_the_full_disk(tempfile.gettempdir(), "the data set", remedy="free space there or set TMPDIR"):
        while rest:
            rest = rest[file.write(rest) :]
