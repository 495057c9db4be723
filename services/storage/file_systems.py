"""File systems: full disks, temporary files, and URL schemes that need an optional package."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from defuse.errors import NotReady, StoreFull

# The extra of this distribution that brings what fsspec needs for a kind of URL.
_EXTRAS = {
    "http": "stack",
    "https": "stack",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
}


@contextmanager
def naming_missing_package(url: str) -> Iterator[None]:
    """Turn the import that fails for want of a package into NotReady that says what to install."""
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'defuse-ml[{extra}]'" if extra else "install what it names"
        raise NotReady(
            f"{url!r} needs a package that this service does not have ({error}); {remedy} and start the service again",
            reason="PACKAGE_MISSING",
        ) from error


# A quota and a file-size limit are full disks to the one who writes.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def naming_full_disk(where: str, what: str, *, remedy: str = "free space there and the work goes on") -> Iterator[None]:
    """Turn the refusal of a full disk into StoreFull that says where there is no room, for what, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(f"{where} has no room for {what} ({error.strerror}); {remedy}") from error


def scratch_file() -> IO[bytes]:
    """Open a temporary file that is gone when it is closed; fill it with `append`."""
    # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
    return tempfile.TemporaryFile(prefix="defuse-", buffering=0)


def append(file: IO[bytes], chunk: bytes) -> None:
    """Write a whole chunk; raise StoreFull where there is no room for it."""
    rest = memoryview(chunk)
    with naming_full_disk(tempfile.gettempdir(), "the data set", remedy="free space there or set TMPDIR"):
        while rest:
            rest = rest[file.write(rest) :]
