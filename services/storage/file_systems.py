"""File systems: full disks, temporary files, optional packages, and local copies of remote artifacts.

fsspec's `filecache` is not used for the copies: it bounds the age of its files, not their bytes, so a long run would
fill the disk.
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


class LocalCopies:
    """Keeps the copies that were used last, at most `max_bytes` or one, in a directory that ends with this object.

    Safe to use from several threads. Two that ask for the same artifact at once may both fetch it.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._directory = Path(tempfile.mkdtemp(prefix="defuse-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._lock = threading.Lock()
        # Sizes by name, the one used last at the end.
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def open(self, key: str, fetch: Callable[[Path], object]) -> BinaryIO:
        """Open the copy of an artifact, which `fetch` writes to a path where it is not there yet."""
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
            # Arrays that are mapped from it stay whole: the system keeps a file until nobody has it open.
            (self._directory / oldest).unlink(missing_ok=True)
        return file
