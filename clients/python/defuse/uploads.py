"""Users' files on their way to the gateway: in chunks, named by their content."""

import hashlib
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from defuse.errors import InvalidInput

CHUNK_BYTES = 512 * 1024
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


def _zipped(source: Path, target: Path) -> Path:
    """Pack a directory, uncompressed because pictures are; the same content gives the same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(source).as_posix(), date_time=_EPOCH)
            archive.writestr(entry, path.read_bytes())
    return target
