"""Local copies of remote artifacts, which can be mapped.

fsspec's `filecache` is not used: it bounds the age of its files, not their bytes, so a long run would fill the disk.
"""

import hashlib
import shutil
import tempfile
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from services.storage.file_systems import naming_full_disk


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
