"""File systems: full disks, temporary files, packages and local copies.

fsspec's `filecache` is not used for the copies, because it bounds the age of its files instead of their bytes. A long
run would fill the disk.
"""

import errno
import hashlib
import shutil
import tempfile
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from defuse.errors import NotReady, StoreFull

# The extra of this distribution with the fsspec package for a kind of URL.
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
    """Raise NotReady that names the extra when a package is missing."""
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'defuse-ml[{extra}]'" if extra else "install that package"
        raise NotReady(
            f"{url!r} needs a package that this service does not have ({error}); {remedy} and start the service again",
            reason="PACKAGE_MISSING",
        ) from error


# Exceeded quotas and file-size limits count as full disks.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def naming_full_disk(
    where: str, what: str, *, remedy: str = "free space there; the work then continues"
) -> Iterator[None]:
    """Raise StoreFull when the disk is full.

    The error names the place, the content and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(f"{where} has no room for {what} ({error.strerror}); {remedy}") from error


def scratch_file() -> IO[bytes]:
    """Open a temporary file that is deleted when it is closed.

    `append_chunk` writes to it.
    """
    # Unbuffered: a write that a full disk refused must not be repeated when the file is closed.
    return tempfile.TemporaryFile(prefix="defuse-", buffering=0)


def append_chunk(file: IO[bytes], chunk: bytes) -> None:
    """Write a whole chunk; raise StoreFull on a full disk."""
    rest = memoryview(chunk)
    with naming_full_disk(tempfile.gettempdir(), "the data set", remedy="free space there or set TMPDIR"):
        while rest:
            rest = rest[file.write(rest) :]


class LocalCopies:
    """Keeps the most recently used copies in a temporary directory.

    The copies have at most `max_bytes` in all, or there is one copy. It is safe to use from several threads. Two
    concurrent requests for the same artifact may both fetch it.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._directory = Path(tempfile.mkdtemp(prefix="defuse-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._lock = threading.Lock()
        # Sizes by name, the most recently used last.
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def open(self, key: str, fetch: Callable[[Path], object]) -> BinaryIO:
        """Open the copy of an artifact.

        `fetch` writes a missing copy to a path.
        """
        name = hashlib.sha256(key.encode()).hexdigest()
        with self._lock, suppress(FileNotFoundError):
            return self._used(name)
        partial = self._directory / f"{uuid.uuid4().hex}.partial"
        try:
            with naming_full_disk(str(self._directory), f"a copy of {key}"):
                fetch(partial)
            with self._lock:
                partial.replace(self._directory / name)
                return self._used(name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _used(self, name: str) -> BinaryIO:
        path = self._directory / name
        file = path.open("rb")
        self._sizes[name] = path.stat().st_size
        self._sizes.move_to_end(name)
        while sum(self._sizes.values()) > self._max_bytes and len(self._sizes) > 1:
            oldest, _ = self._sizes.popitem(last=False)
            # Arrays mapped from it stay valid: the system keeps an open file until it is closed.
            (self._directory / oldest).unlink(missing_ok=True)
        return file
