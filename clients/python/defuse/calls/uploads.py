"""Uploads of data sets and other files in chunks, addressed by digest.

A file is uploaded only if the gateway does not have its digest.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from defuse.calls.sans_io import BlockingWork, Rpc, SansIoCall, new_request_id
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Dataset

CHUNK_BYTES = 512 * 1024
_UPLOAD_DEADLINE_S = 3600.0
# The services read the whole data set, possibly from a URL, before the response.
_DATASET_DEADLINE_S = 3600.0
# The earliest time in a zip. With a fixed time, the same directory always gives the same archive.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def add_dataset(
    source: str | Path, *, seed: int = 0, on_progress: Callable[[int, int], None] = lambda _sent, _total: None
) -> SansIoCall[Dataset]:
    """Create a data set from a directory, a file or a URL.

    The source is a directory of class folders, an `.npz` file, or a URL that the
    services can read. `seed` draws the splits that the source does not have.
    `on_progress` receives the bytes sent and the total bytes.
    """
    request = pb.CreateDatasetRequest(display_name=str(source), seed=seed, request_id=new_request_id())
    if "://" in str(source):
        request.uri = str(source)
    else:
        with ExitStack() as stack:
            path = yield BlockingWork(function=lambda: stack.enter_context(dataset_file(Path(source))))
            request.file_digest = yield from upload_file(path, on_progress)
    response = yield Rpc(method="CreateDataset", request=request, timeout_s=_DATASET_DEADLINE_S)
    return Dataset.from_proto(response.dataset)


@contextmanager
def dataset_file(source: Path) -> Iterator[Path]:
    """Yield the file to upload for a data set.

    It is `source` itself, or a temporary zip of a directory.
    """
    if source.is_file():
        yield source
    elif source.is_dir():
        with tempfile.TemporaryDirectory(prefix="defuse-") as directory:
            yield _write_zip(source, Path(directory) / "images.zip")
    else:
        raise InvalidInput(f"file or directory {str(source)!r} does not exist")


def _write_zip(source: Path, target: Path) -> Path:
    """Write a directory to an uncompressed zip and return its path.

    The same content gives the same bytes.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(source).as_posix(), date_time=_ZIP_EPOCH)
            archive.writestr(entry, path.read_bytes())
    return target


def read_content(file: str | Path | bytes) -> SansIoCall[bytes]:
    """Return the content of a file, or the given bytes.

    Raises InvalidInput for an unreadable file.
    """
    if isinstance(file, bytes):
        return file
    content: bytes = yield BlockingWork(function=lambda: _read_file(Path(file)))
    return content


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def upload_bytes(content: bytes) -> SansIoCall[str]:
    """Upload content from memory and return its digest."""
    pieces = [content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES)]
    return (yield from _upload(digest_of([content]), lambda: iter(pieces)))


def upload_file(path: Path, on_progress: Callable[[int, int], None]) -> SansIoCall[str]:
    """Upload a file and return its digest.

    `on_progress` receives the bytes sent and the total bytes.
    """
    total = path.stat().st_size

    def chunks_with_progress() -> Iterator[bytes]:
        sent = 0
        for chunk in chunks(path):
            yield chunk
            sent += len(chunk)
            on_progress(sent, total)

    digest = yield BlockingWork(function=lambda: digest_of(chunks(path)))
    return (yield from _upload(digest, chunks_with_progress))


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most `CHUNK_BYTES`."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def digest_of(pieces: Iterable[bytes]) -> str:
    """Return the hexadecimal SHA-256 of content in pieces."""
    content = hashlib.sha256()
    for piece in pieces:
        content.update(piece)
    return content.hexdigest()


def _upload(digest: str, content: Callable[[], Iterator[bytes]]) -> SansIoCall[str]:
    try:
        yield Rpc(method="GetFile", request=pb.GetFileRequest(digest=digest))
    except NotFound:
        yield Rpc(method="UploadFile", request=_upload_requests(digest, content()), timeout_s=_UPLOAD_DEADLINE_S)
    return digest


def _upload_requests(digest: str, content: Iterator[bytes]) -> Iterator[pb.UploadFileRequest]:
    yield pb.UploadFileRequest(digest=digest)
    for chunk in content:
        yield pb.UploadFileRequest(chunk=chunk)
