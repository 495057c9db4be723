import os
import zipfile
from pathlib import Path

import pytest
from defuse.calls.uploads import CHUNK_BYTES, chunks, dataset_file, digest_of
from defuse.errors import InvalidInput


def write_tree(root: Path, *, reverse: bool = False, content: bytes = b"pixels") -> Path:
    """Write a small tree of files, in either order."""
    files = ["ant/1.png", "ant/2.png", "bee/sub/3.png", "classes.txt"]
    for name in reversed(files) if reverse else files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + name.encode())
    return root


def digest(source: Path) -> str:
    with dataset_file(source) as file:
        return digest_of(chunks(file))


def test_chunks(tmp_path: Path) -> None:
    """Chunks are bounded, and together they are the file.

    An empty file has none.
    """
    content = os.urandom(2 * CHUNK_BYTES + 7)
    (tmp_path / "file").write_bytes(content)
    pieces = list(chunks(tmp_path / "file"))
    assert [len(piece) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, 7]
    assert b"".join(pieces) == content
    (tmp_path / "empty").write_bytes(b"")
    assert list(chunks(tmp_path / "empty")) == []


def test_digest() -> None:
    """The digest is the SHA-256 of the content, whatever the pieces."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of([b"abc"]) == digest_of([b"a", b"", b"bc"]) == expected


def test_dataset_file_of_a_file(tmp_path: Path) -> None:
    """A file is uploaded unchanged."""
    file = tmp_path / "images.npz"
    file.write_bytes(b"arrays")
    with dataset_file(file) as sent:
        assert sent == file


def test_dataset_file_of_a_directory(tmp_path: Path) -> None:
    """The zip has every file, and is deleted afterwards."""
    with dataset_file(write_tree(tmp_path / "pets")) as file:
        with zipfile.ZipFile(file) as archive:
            assert archive.namelist() == ["ant/1.png", "ant/2.png", "bee/sub/3.png", "classes.txt"]
            assert archive.read("bee/sub/3.png") == b"pixelsbee/sub/3.png"
        packed = file
    assert not packed.exists()


def test_equal_directories_have_one_digest(tmp_path: Path) -> None:
    """Location, times, order and permissions do not change the digest."""
    first = write_tree(tmp_path / "here")
    second = write_tree(tmp_path / "there", reverse=True)
    os.utime(second / "ant/1.png", (0, 0))
    (second / "ant/2.png").chmod(0o600)
    (second / "empty").mkdir()
    assert digest(first) == digest(second)


@pytest.mark.parametrize("change", ["content", "name", "less"])
def test_different_directories_have_different_digests(change: str, tmp_path: Path) -> None:
    """Content, names and number of files change the digest."""
    first, second = write_tree(tmp_path / "here"), write_tree(tmp_path / "there")
    if change == "content":
        (second / "ant/1.png").write_bytes(b"other")
    elif change == "name":
        (second / "ant/1.png").rename(second / "ant/0.png")
    else:
        (second / "ant/1.png").unlink()
    assert digest(first) != digest(second)


def test_missing_path(tmp_path: Path) -> None:
    """The error names a missing path."""
    with pytest.raises(InvalidInput, match="no-such"), dataset_file(tmp_path / "no-such"):
        pytest.fail("there is nothing to send")
