import errno
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from defuse.errors import StoreFull

from services.storage.artifacts import ArtifactStore
from services.storage.file_systems import LocalCopies

KIBIBYTE = 1 << 10


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this disk where copies go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def remote(here: Path) -> Callable[[int], ArtifactStore]:
    """Make a store that is elsewhere, with artifacts a, b, c of a little more than 100 KiB, whose numbers say which."""

    def store(copies_bytes: int) -> ArtifactStore:
        made = ArtifactStore(f"memory://{here}/store", copies_bytes=copies_bytes)
        for number, key in enumerate("abc"):
            made.write_arrays(key, {"x": np.full(100 * KIBIBYTE, number, np.uint8)})
        return made

    return store


def fetched(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the key of every artifact that is fetched from now on."""
    keys: list[str] = []
    get_file = store._fs.get_file

    def noting(path: str, target: str) -> None:
        keys.append(path.rsplit("/", 1)[-1])
        get_file(path, target)

    monkeypatch.setattr(store._fs, "get_file", noting)
    return keys


def copied_bytes(here: Path) -> int:
    return sum(path.stat().st_size for path in here.rglob("*") if path.is_file())


def test_copies_end_with_the_store(remote: Callable[[int], ArtifactStore], here: Path) -> None:
    """Copies are removed with their store object."""
    store = remote(KIBIBYTE * KIBIBYTE)
    array = store.map_arrays("b")["x"]
    assert copied_bytes(here) > array.nbytes
    del store
    assert list(here.iterdir()) == []
    assert (array == 1).all()


def test_the_least_recently_used_copy_is_evicted(
    remote: Callable[[int], ArtifactStore], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies stay within their bound; the most recently used one is not fetched again."""
    store = remote(250 * KIBIBYTE)
    keys = fetched(store, monkeypatch)
    for key in "abac":
        store.map_arrays(key)
        assert copied_bytes(here) <= 250 * KIBIBYTE
    assert keys == ["a", "b", "c"]
    store.map_arrays("a")
    assert keys == ["a", "b", "c"]
    store.map_arrays("b")
    assert keys == ["a", "b", "c", "b"]


def test_arrays_outlive_their_copy(remote: Callable[[int], ArtifactStore]) -> None:
    """Arrays that are in use stay whole when their copy is removed."""
    store = remote(110 * KIBIBYTE)
    arrays = [store.map_arrays(key)["x"] for key in "abcab"]
    for number, array in zip([0, 1, 2, 0, 1], arrays, strict=True):
        assert (array == number).all()


def test_one_artifact_beyond_the_bound(
    remote: Callable[[int], ArtifactStore], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy used last stays however large it is, so that it is not fetched again and again."""
    store = remote(KIBIBYTE)
    keys = fetched(store, monkeypatch)
    for key in "aabb":
        store.map_arrays(key)
        assert copied_bytes(here) < 110 * KIBIBYTE
    assert keys == ["a", "b"]


def test_many_readers_at_once(here: Path) -> None:
    """Readers in several threads get what they asked for, while copies come and go under them."""
    copies = LocalCopies(max_bytes=KIBIBYTE)
    read: list[str] = []

    def ask(keys: str) -> None:
        for key in keys * 50:
            content = key.encode() * KIBIBYTE
            with copies.open(key, partial(Path.write_bytes, data=content)) as file:
                assert file.read() == content
            read.append(key)

    threads = [threading.Thread(target=ask, args=(keys,)) for keys in ("abc", "cba", "aab", "bca")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 4 * 3 * 50
    assert copied_bytes(here) == KIBIBYTE


def test_no_space_for_a_copy(here: Path) -> None:
    """A disk without room is StoreFull, by its directory and the artifact, and nothing is left of the copy."""

    def fetch(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreFull, match=rf"{here}/defuse-\S+ has no room for a copy of runs/a"):
        LocalCopies(max_bytes=KIBIBYTE).open("runs/a", fetch)
    assert copied_bytes(here) == 0
