"""The artifact store, on any file system that fsspec supports.

An artifact is written completely or not at all, and never changed. Arrays are safetensors and records are protobuf, so
that reading the store cannot run code.
"""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from defuse.errors import Internal, NotFound, Unavailable
from fsspec.implementations.local import LocalFileSystem
from google.protobuf.message import DecodeError, Message

from services.runtime.settings import STORE_COPIES_BYTES
from services.storage.file_systems import LocalCopies, naming_full_disk, naming_missing_package
from services.storage.safetensors import StreamedArray, mapped_arrays, write_streamed

Arrays = Mapping[str, npt.NDArray[Any]]
M = TypeVar("M", bound=Message)


class ArtifactStore:
    """Reads and writes artifacts below one fsspec URL.

    It is safe to use from several threads and processes. `copies_bytes` bounds the local copies that mapping the arrays
    of a remote store needs.
    """

    def __init__(self, url: str, *, copies_bytes: int = STORE_COPIES_BYTES) -> None:
        self.url = url.rstrip("/")
        with naming_missing_package(self.url):
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        self._copies = None if isinstance(self._fs, LocalFileSystem) else LocalCopies(max_bytes=copies_bytes)

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
        """Write an artifact completely.

        Raises StoreFull on a full disk, and then leaves nothing behind.
        """
        with self.writing(key) as file:
            file.write(data)

    @contextmanager
    def writing(self, key: str) -> Iterator[Any]:
        """Open an artifact for writing.

        It appears under its key when the block ends without an error.
        """
        path, temporary = self._path(key), self._path(f"{key}.{uuid.uuid4().hex}.partial")
        with naming_full_disk(f"the artifact store {self.url}", key):
            try:
                self._fs.makedirs(self._fs._parent(path), exist_ok=True)  # noqa: SLF001  # fsspec has no public name
                with self._fs.open(temporary, "wb") as file:
                    yield file
                self._fs.mv(temporary, path)
            except BaseException:
                self._discard(temporary)
                raise

    def create_bytes(self, key: str, data: bytes) -> None:
        """Write an artifact that several processes may create at once.

        The first one stays, and the others change nothing. This is guaranteed on a local file system; elsewhere two
        concurrent writers can both write.
        """
        if self.exists(key):
            return
        if not isinstance(self._fs, LocalFileSystem):
            self.write_bytes(key, data)
            return
        own = f"{key}.{uuid.uuid4().hex}.partial"
        self.write_bytes(own, data)
        try:
            with suppress(FileExistsError):
                os.link(self._path(own), self._path(key))
        finally:
            self._discard(self._path(own))

    def read_bytes(self, key: str) -> bytes:
        with self._finding(key):
            data: bytes = self._fs.cat_file(self._path(key))
        return data

    def size(self, key: str) -> int:
        with self._finding(key):
            return int(self._fs.size(self._path(key)))

    def open(self, key: str) -> Any:
        """Open an artifact for reading, as a seekable file."""
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
        self.write_bytes(key, _safetensors(arrays))

    def create_arrays(self, key: str, arrays: Arrays) -> None:
        """Write arrays that several processes may create at once.

        It does so as `create_bytes` does.
        """
        self.create_bytes(key, _safetensors(arrays))

    def write_streamed(self, key: str, arrays: Mapping[str, StreamedArray]) -> None:
        """Write arrays that are never in memory as a whole.

        They are read as any other arrays.
        """
        with self.writing(key) as file:
            write_streamed(file, arrays)

    def read_arrays(self, key: str) -> dict[str, npt.NDArray[Any]]:
        data = self.read_bytes(key)
        try:
            arrays: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise Internal(
                f"{key} in {self.url} is not a safetensors file ({error}); restore it from a copy"
            ) from error
        return arrays

    def map_arrays(self, key: str) -> dict[str, npt.NDArray[Any]]:
        """Return arrays whose rows are read from disk on use.

        Memory is thus bounded for any size. An artifact of a remote store is copied to this disk first, and the most
        recently used copies are kept.
        """
        with self._finding(key), self._on_this_disk(key) as file:
            return mapped_arrays(file, whose=f"{key} in {self.url}")

    def remove(self, key: str) -> None:
        """Remove an artifact."""
        self._discard(self._path(key))

    def remove_below(self, prefix: str) -> None:
        """Remove every artifact below a prefix.

        Several processes may do so at the same time.
        """
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(prefix), recursive=True)
        self._fs.invalidate_cache()

    def _on_this_disk(self, key: str) -> BinaryIO:
        path = self._path(key)
        if self._copies is None:
            return Path(path).open("rb")
        return self._copies.open(key, lambda copy: self._fs.get_file(path, str(copy)))

    @contextmanager
    def _finding(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"the artifact store {self.url} has no {key}", reason="ARTIFACT_NOT_FOUND") from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _discard(self, path: str) -> None:
        with suppress(FileNotFoundError):  # also when another process removes it concurrently
            if self._fs.exists(path):
                self._fs.rm(path)


def _safetensors(arrays: Arrays) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
