"""Users' files on their way to the gateway: in chunks, named by their content, sent only if it is not there yet."""

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from defuse.errors import InvalidInput, NotFound
from defuse.steps import Call, Steps, Work
from defuse.v1 import gateway_service_pb2 as pb

CHUNK_BYTES = 512 * 1024
_UPLOAD_DEADLINE_S = 3600.0
# The earliest time that a zip can hold: the same folder is always the same file.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most `CHUNK_BYTES`."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def digest_of(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 of content in pieces, hexadecimal."""
    content = hashlib.sha256()
    for piece in pieces:
        content.update(piece)
    return content.hexdigest()


def read_file(path: Path) -> bytes:
    """Return the content of a user's file; raise InvalidInput, naming it, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def content_of(file: str | Path | bytes) -> Steps[bytes]:
    """Return the content of a user's file, or what is given in its place."""
    if isinstance(file, bytes):
        return file
    content: bytes = yield Work(function=lambda: read_file(Path(file)))
    return content


@contextmanager
def dataset_file(source: Path) -> Iterator[Path]:
    """Give the file to send for a data set: the `.npz` itself, or a zip of the directory, made for the occasion."""
    if source.is_file():
        yield source
    elif source.is_dir():
        with tempfile.TemporaryDirectory(prefix="defuse-") as directory:
            yield _zipped(source, Path(directory) / "images.zip")
    else:
        raise InvalidInput(f"there is no file or directory {str(source)!r}")


def upload_bytes(content: bytes) -> Steps[str]:
    """Send content that is in memory; return its digest."""
    parts = [content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES)]
    return (yield from _upload(digest_of([content]), lambda: iter(parts)))


def upload_file(path: Path, on_progress: Callable[[int, int], None]) -> Steps[str]:
    """Send a file; return its digest. `on_progress` is told the bytes sent and the bytes in all."""
    total = path.stat().st_size

    def counted() -> Iterator[bytes]:
        sent = 0
        for chunk in chunks(path):
            yield chunk
            sent += len(chunk)
            on_progress(sent, total)

    digest = yield Work(function=lambda: digest_of(chunks(path)))
    return (yield from _upload(digest, counted))


def _upload(digest: str, content: Callable[[], Iterator[bytes]]) -> Steps[str]:
    try:
        yield Call(method="GetFile", request=pb.GetFileRequest(digest=digest))
    except NotFound:
        yield Call(method="UploadFile", request=_requests(digest, content()), timeout_s=_UPLOAD_DEADLINE_S)
    return digest


def _requests(digest: str, content: Iterator[bytes]) -> Iterator[pb.UploadFileRequest]:
    yield pb.UploadFileRequest(digest=digest)
    for chunk in content:
        yield pb.UploadFileRequest(chunk=chunk)


def _zipped(source: Path, target: Path) -> Path:
    """Pack a directory, uncompressed because pictures are; the same content gives the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(source).as_posix(), date_time=_EPOCH)
            archive.writestr(entry, path.read_bytes())
    return target
