import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from defuse.errors import InvalidInput, NotFound

from services.gateway.files.files import Files
from services.storage import keys
from services.storage.artifacts import ArtifactStore

CHUNKS = (b"first ", b"second ", b"third")
CONTENT = b"".join(CHUNKS)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(store: ArtifactStore) -> Files:
    return Files(store, max_bytes=100)


async def sent(chunks: tuple[bytes, ...], *, breaks_off: bool = False) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if breaks_off:
        raise ConnectionResetError


def receive(files: Files, digest: str, chunks: tuple[bytes, ...], *, breaks_off: bool = False) -> int:
    return asyncio.run(files.receive(digest, sent(chunks, breaks_off=breaks_off)))


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_is_stored_under_its_digest(files: Files, store: ArtifactStore, tmp_path: Path) -> None:
    """Chunks become one file, with its size, and nothing beside it."""
    assert receive(files, DIGEST, CHUNKS) == len(CONTENT) == files.size(DIGEST)
    assert store.read_bytes(keys.file(DIGEST)) == CONTENT
    assert left(tmp_path) == [DIGEST]


def test_the_same_file_again_is_not_read(files: Files) -> None:
    """A file that is stored already is answered at once, without its chunks."""
    receive(files, DIGEST, CHUNKS)
    assert receive(files, DIGEST, (), breaks_off=True) == len(CONTENT)


def test_digest_mismatch_leaves_nothing(files: Files, tmp_path: Path) -> None:
    """Content with another digest is refused with both digests, and nothing is left of it."""
    with pytest.raises(InvalidInput, match=hashlib.sha256(b"first ").hexdigest()) as caught:
        receive(files, DIGEST, CHUNKS[:1])
    assert DIGEST in caught.value.message
    assert caught.value.field == "digest"
    assert left(tmp_path) == []
    assert receive(files, DIGEST, CHUNKS) == len(CONTENT)


def test_too_large(files: Files, tmp_path: Path) -> None:
    """A file beyond the limit is refused when the limit is passed, and nothing is left of it."""
    with pytest.raises(InvalidInput, match="larger than 100 bytes"):
        receive(files, DIGEST, (b"x" * 60, b"x" * 60), breaks_off=True)
    assert left(tmp_path) == []


def test_the_limit_itself_is_allowed(files: Files) -> None:
    """A file of exactly the limit is stored."""
    assert receive(files, hashlib.sha256(b"x" * 100).hexdigest(), (b"x" * 50, b"x" * 50)) == 100


def test_a_sender_that_breaks_off_leaves_nothing(files: Files, tmp_path: Path) -> None:
    """An upload that ends in the middle leaves nothing, and can be sent again."""
    with pytest.raises(ConnectionResetError):
        receive(files, DIGEST, CHUNKS[:2], breaks_off=True)
    assert left(tmp_path) == []
    assert receive(files, DIGEST, CHUNKS) == len(CONTENT)


def test_an_empty_file(files: Files) -> None:
    """A file may be empty."""
    digest = hashlib.sha256().hexdigest()
    assert receive(files, digest, ()) == files.size(digest) == 0


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST[:-1], f"{DIGEST}\n"])
def test_what_is_no_digest(digest: str, files: Files) -> None:
    """A digest is 64 small hexadecimal digits, so that it can be no path."""
    for ask in (lambda: receive(files, digest, CHUNKS), lambda: files.size(digest)):
        with pytest.raises(InvalidInput, match="SHA-256"):
            ask()


def test_a_file_that_is_not_there(files: Files) -> None:
    """An unknown digest is named."""
    with pytest.raises(NotFound, match=DIGEST):
        files.size(DIGEST)
