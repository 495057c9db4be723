"""The artifact store: the record of everything, on any file system that fsspec knows.

An artifact is written whole or not at all, and never changed. Arrays are safetensors, records are protobuf, so that
nothing read from the store can run code.
"""

import errno
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from defuse.errors import Internal, NotFound, StoreFull, Unavailable
from google.protobuf.message import DecodeError, Message

from services.runtime.file_systems import naming_the_extra

# A quota and a file-size limit are full disks to the one who writes.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Arrays = Mapping[str, npt.NDArray[Any]]
M = TypeVar("M", bound=Message)


class ArtifactStore:
    """Reads and writes artifacts below one fsspec URL. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with naming_the_extra(self.url):
            self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def check(self) -> None:
        """Raise Unavailable unless the store can be reached."""
        try:
            self._fs.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"the artifact store {self.url} cannot be reached ({error}); mend it or set DEFUSE_STORE_URL",
                reason="STORE_UNAVAILABLE",
            ) from error

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(self._path(key)))

    def keys(self, prefix: str) -> list[str]:
        """Return the keys directly below a prefix, ascending."""
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{prefix}/{path.rstrip('/').rsplit('/', 1)[-1]}" for path in paths)

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write an artifact whole; raise StoreFull when there is no room, leaving nothing behind."""
        with self.writing(key) as file:
            file.write(data)

    @contextmanager
    def writing(self, key: str) -> Iterator[Any]:
        """Open an artifact for writing; it appears under its key when the block ends without an error."""
        path, temporary = self._path(key), self._path(f"{key}.{uuid.uuid4().hex}.partial")
        try:
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)  # noqa: SLF001  # fsspec has no public name for it
            with self._fs.open(temporary, "wb") as file:
                yield file
            self._fs.mv(temporary, path)
        except BaseException as error:
            self._discard(temporary)
            if isinstance(error, OSError) and error.errno in FULL:
                raise StoreFull(
                    f"the artifact store {self.url} has no room for {key} ({error.strerror}); free space there and the "
                    "work goes on"
                ) from error
            raise

    def read_bytes(self, key: str) -> bytes:
        with self._finding(key):
            data: bytes = self._fs.cat_file(self._path(key))
        return data

    def size(self, key: str) -> int:
        with self._finding(key):
            return int(self._fs.size(self._path(key)))

    def open(self, key: str) -> Any:
        """Open an artifact for reading, seekable."""
        with self._finding(key):
            return self._fs.open(self._path(key), "rb")

    def write_message(self, key: str, message: Message) -> None:
        self.write_bytes(key, message.SerializeToString(deterministic=True))

    def read_message(self, key: str, kind: type[M]) -> M:
        message = kind()
        data = self.read_bytes(key)
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise Internal(f"{key} in {self.url} is no {kind.__name__} ({error}); restore it from a copy") from error
        return message

    def write_arrays(self, key: str, arrays: Arrays) -> None:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.write_bytes(key, safetensors.numpy.save(contiguous))

    def read_arrays(self, key: str) -> dict[str, npt.NDArray[Any]]:
        data = self.read_bytes(key)
        try:
            arrays: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise Internal(
                f"{key} in {self.url} is not a safetensors file ({error}); restore it from a copy"
            ) from error
        return arrays

    @contextmanager
    def _finding(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"the artifact store {self.url} has no {key}", reason="ARTIFACT_NOT_FOUND") from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _discard(self, path: str) -> None:
        if self._fs.exists(path):
            self._fs.rm(path)
