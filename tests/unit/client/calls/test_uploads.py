import os
import zipfile
from pathlib import Path

import pytest
from defuse.calls.uploads import CHUNK_BYTES, chunks, dataset_file, digest_of
from defuse.errors import InvalidInput


def planted(root: Path, *, reverse: bool = False, content: bytes = b"pixels") -> Path:
    """Write the same small tree, in one order or the other."""
    files = ["ant/1.png", "ant/2.png", "bee/sub/3.png", "classes.txt"]
    for name in reversed(files) if reverse else files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + name.encode())
    return root


def digest(source: Path) -> str:
    with dataset_file(source) as file:
        return digest_of(chunks(file))


def test_a_file_in_chunks(tmp_path: Path) -> None:
    """Chunks are small, and together they are the file; an empty file has none."""
    content = os.urandom(2 * CHUNK_BYTES + 7)
    (tmp_path / "file").write_bytes(content)
    pieces = list(chunks(tmp_path / "file"))
    assert [len(piece) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, 7]
    assert b"".join(pieces) == content
    (tmp_path / "empty").write_bytes(b"")
    assert list(chunks(tmp_path / "empty")) == []


def test_digest() -> None:
    """The digest is the content's SHA-256, however it is cut."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of([b"abc"]) == digest_of([b"a", b"", b"bc"]) == expected


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    """A file needs no packing."""
    file = tmp_path / "images.npz"
    file.write_bytes(b"arrays")
    with dataset_file(file) as sent:
        assert sent == file


def test_a_directory_is_packed(tmp_path: Path) -> None:
    """Every file of a directory is in the zip below its relative name, and the zip is gone afterwards."""
    with dataset_file(planted(tmp_path / "pets")) as file:
        with zipfile.ZipFile(file) as archive:
            assert archive.namelist() == ["ant/1.png", "ant/2.png", "bee/sub/3.png", "classes.txt"]
            assert archive.read("bee/sub/3.png") == b"pixelsbee/sub/3.png"
        packed = file
    assert not packed.exists()


def test_the_same_directory_is_the_same_file(tmp_path: Path) -> None:
    """Where it lies, when and in which order it was written, and who may read it do not change the digest."""
    first = planted(tmp_path / "here")
    second = planted(tmp_path / "there", reverse=True)
    os.utime(second / "ant/1.png", (0, 0))
    (second / "ant/2.png").chmod(0o600)
    (second / "empty").mkdir()
    assert digest(first) == digest(second)


@pytest.mark.parametrize("change", ["content", "name", "less"])
def test_another_directory_is_another_file(change: str, tmp_path: Path) -> None:
    """Another content, name or number of files is another digest."""
    first, second = planted(tmp_path / "here"), planted(tmp_path / "there")
    if change == "content":
        (second / "ant/1.png").write_bytes(b"other")
    elif change == "name":
        (second / "ant/1.png").rename(second / "ant/0.png")
    else:
        (second / "ant/1.png").unlink()
    assert digest(first) != digest(second)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    """A missing path is named."""
    with pytest.raises(InvalidInput, match="no-such"), dataset_file(tmp_path / "no-such"):
        pytest.fail("there is nothing to send")
