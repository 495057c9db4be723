"""Data sets from files and URLs, identified by content and seed.

A URL is copied into a temporary file as a whole, for two reasons: a zip file needs random access, which not every web
server offers, and the hashed bytes must be the parsed ones.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import dataset_pb2
from fsspec.asyn import sync

from services.datasets import SPLITS, ParsedImages, SplitImages, parse_images
from services.gateway.files.files import Files
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.storage.file_systems import append_chunk, naming_missing_package, scratch_file
from services.storage.safetensors import StreamedArray


class Datasets:
    """Creates data sets from uploaded files and URLs."""

    def __init__(self, store: ArtifactStore, files: Files, *, max_bytes: int) -> None:
        self._store = store
        self._files = files
        self._max_bytes = max_bytes

    def create(self, *, file_digest: str, uri: str, display_name: str, seed: int) -> dataset_pb2.Dataset:
        """Return the data set of an uploaded file or a URL.

        The same content and seed give the same data set.
        """
        if bool(file_digest) == bool(uri):
            raise InvalidInput("give either the digest of an uploaded file or a URL", reason="BAD_DATASET", field="uri")
        if uri:
            with downloaded(uri, max_bytes=self._max_bytes) as (file, digest):
                return self._create(file, digest, display_name or uri, seed)
        self._files.size(file_digest)
        with self._store.open(keys.file(file_digest)) as file:
            return self._create(file, file_digest, display_name, seed)

    def _create(self, file: IO[bytes], digest: str, display_name: str, seed: int) -> dataset_pb2.Dataset:
        name = names.dataset(hashlib.sha256(f"{digest}:{seed}".encode()).hexdigest()[:16])
        if not self._store.exists(keys.dataset(name)):
            parsed = parse_images(file, seed=seed)
            for split in SPLITS:
                self._store.write_streamed(keys.split(name, split), _arrays(parsed.splits[split]))
            # Written last: a data set with a record is complete.
            self._store.write_message(keys.dataset(name), _record(name, display_name, parsed))
        return Catalog(self._store).dataset(name)


def _arrays(split: SplitImages) -> dict[str, StreamedArray]:
    shape = (len(split.labels), *split.image_shape)
    return {
        "x": StreamedArray(shape=shape, dtype=np.uint8, parts=split.parts()),
        "y": StreamedArray.whole(split.labels),
    }


def _record(name: str, display_name: str, parsed: ParsedImages) -> dataset_pb2.Dataset:
    record = dataset_pb2.Dataset(
        name=name,
        display_name=display_name,
        image_shape=parsed.splits["train"].image_shape,
        classes=parsed.classes,
        label_count=1 + max(int(split.labels.max()) for split in parsed.splits.values()),
        splits=[
            dataset_pb2.Split(name=split, size=len(images.labels), cut_by_seed=images.cut_by_seed)
            for split, images in parsed.splits.items()
        ],
    )
    record.create_time.GetCurrentTime()
    return record


_PROTOCOLS = ("s3", "gs", "az", "http", "https")
_CHUNK_BYTES = 1024 * 1024
# Longest silence of a web server; the whole download may take as long as the caller waits.
_SILENCE_S = 60.0


@contextmanager
def downloaded(uri: str, *, max_bytes: int) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a URL's content as a seekable file, with its hexadecimal SHA-256.

    Raises InvalidInput for a URL that cannot be read or has more than `max_bytes`, NotReady when the package for this
    kind of URL is not installed, and StoreFull when the temporary file does not fit on the disk.
    """
    protocol = _protocol(uri)
    with scratch_file() as target:
        with naming_missing_package(uri), _file_system(protocol) as file_system:
            digest = _copy(file_system, uri, target, max_bytes)
        target.seek(0)
        yield target, digest


def _protocol(uri: str) -> str:
    protocol, separator, _ = uri.partition("://")
    if not separator or protocol not in _PROTOCOLS:
        kinds = ", ".join(f"{name}://" for name in _PROTOCOLS)
        raise InvalidInput(
            f"{uri!r} is no URL of a kind that the services read ({kinds}); upload local files",
            reason="BAD_URI",
            field="uri",
        )
    return protocol


@contextmanager
def _file_system(protocol: str) -> Iterator[Any]:
    """Yield the file system of a URL scheme.

    Connections to web servers are closed when the block ends.
    """
    if protocol not in {"http", "https"}:
        yield fsspec.filesystem(protocol)
        return
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    web = fsspec.filesystem(protocol, skip_instance_cache=True, block_size=0, client_kwargs={"timeout": timeout})
    session = sync(web.loop, web.set_session)
    try:
        yield web
    finally:
        web.close_session(web.loop, session)


def _copy(file_system: Any, uri: str, target: IO[bytes], max_bytes: int) -> str:
    content, size = hashlib.sha256(), 0
    for chunk in _chunks(file_system, uri):
        size += len(chunk)
        if size > max_bytes:
            raise InvalidInput(f"{uri!r} is larger than {max_bytes} bytes, the limit", reason="TOO_LARGE", field="uri")
        content.update(chunk)
        append_chunk(target, chunk)
    return content.hexdigest()


def _chunks(file_system: Any, uri: str) -> Iterator[bytes]:
    try:
        with file_system.open(uri, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except Exception as error:  # each file system raises exceptions of its own
        cause = error.__cause__ or error
        raise InvalidInput(
            f"{uri!r} cannot be read ({type(cause).__name__}: {cause}); is it right, and may the services read it?",
            reason="BAD_URI",
            field="uri",
        ) from error
