import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from defuse.errors import Internal, NotFound, Unavailable
from defuse.v1 import run_pb2

from services.storage.artifacts import ArtifactStore


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def write_half(store: ArtifactStore, key: str) -> None:
    with store.writing(key) as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_bytes_messages_and_arrays_come_back(store: ArtifactStore) -> None:
    """Written arrays are read back with their types, also non-contiguous and empty ones."""
    store.write_bytes("a/b", b"content")
    assert store.read_bytes("a/b") == b"content"
    assert store.size("a/b") == 7
    with store.open("a/b") as file:
        file.seek(3)
        assert file.read() == b"tent"
    run = run_pb2.Run(name="runs/first")
    store.write_message("run", run)
    assert store.read_message("run", run_pb2.Run) == run
    arrays = {
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "bytes": np.arange(4, dtype=np.uint8),
        "none": np.zeros((0, 3)),
    }
    store.write_arrays("arrays", arrays)
    for name, array in store.read_arrays("arrays").items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_an_artifact_appears_whole(store: ArtifactStore) -> None:
    """Nobody sees an artifact before it is complete, and two who write it at once leave one of the two, whole."""
    store.write_bytes("a/key", b"old")
    with store.writing("a/key") as first, store.writing("a/key") as second:
        first.write(b"first" * 1000)
        second.write(b"second" * 1000)
        assert store.read_bytes("a/key") == b"old"
    assert store.read_bytes("a/key") == b"first" * 1000


def test_many_writers_of_one_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    """Writers in several threads neither fail nor mix their content."""
    failures: list[BaseException] = []

    def write(value: int) -> None:
        try:
            store.write_bytes("deep/key", bytes([value]) * 10_000)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test must see it
            failures.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(store.read_bytes("deep/key"))) == 1
    assert left(tmp_path) == ["key"]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_created_stays(kind: str, tmp_path: Path) -> None:
    """Of several creators the first one writes: the second changes nothing and leaves nothing."""
    store = ArtifactStore(f"{kind}://{tmp_path}/store")
    for value in (1, 2):
        store.create_bytes("a/bytes", bytes([value]))
        store.create_arrays("a/arrays", {"x": np.array([value])})
    assert store.read_bytes("a/bytes") == b"\x01"
    assert store.read_arrays("a/arrays")["x"].tolist() == [1]
    assert store.keys("a") == ["a/arrays", "a/bytes"]


def test_many_creators_of_one_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    """Of creators in several threads one is the first, and everybody reads what that one made."""
    seen: list[bytes] = []

    def create(value: int) -> None:
        store.create_bytes("deep/key", bytes([value]) * 10_000)
        seen.append(store.read_bytes("deep/key"))

    threads = [threading.Thread(target=create, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert left(tmp_path) == ["key"]


def test_an_error_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    """A block that raises leaves neither an artifact nor a part of one, and its error is passed on."""
    with pytest.raises(ZeroDivisionError):
        write_half(store, "a/key")
    assert not store.exists("a/key")
    assert left(tmp_path) == []


def test_an_error_leaves_what_was_there(store: ArtifactStore, tmp_path: Path) -> None:
    """A failed attempt does not harm an artifact that was written before."""
    store.write_bytes("a/key", b"whole")
    with pytest.raises(ZeroDivisionError):
        write_half(store, "a/key")
    assert store.read_bytes("a/key") == b"whole"
    assert left(tmp_path) == ["key"]


FULL_DISK = """
import resource, sys
from defuse.errors import StoreFull
from services.storage.artifacts import ArtifactStore
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = ArtifactStore(sys.argv[1])
store.write_bytes("small", b"x" * 4096)
for size in (5000, 500_000):
    try:
        store.write_bytes("runs/first/large", b"x" * size)
    except StoreFull as error:
        print(error.reason, error.message)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A full disk is StoreFull, naming store and artifact, and leaves nothing; smaller content is written."""
    url = f"file://{tmp_path}/store"
    answer = subprocess.run(
        [sys.executable, "-c", FULL_DISK, url], capture_output=True, text=True, check=True, timeout=60
    )
    lines = answer.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("STORE_FULL") and url in line and "runs/first/large" in line for line in lines)
    assert left(tmp_path) == ["small"]


def test_what_is_not_there(store: ArtifactStore) -> None:
    """Reading what is not there is NotFound, naming store and key, whichever way it is read."""
    assert not store.exists("no/key")
    for read in (
        store.read_bytes,
        store.read_arrays,
        lambda key: store.read_message(key, run_pb2.Run),
        store.size,
        store.open,
    ):
        with pytest.raises(NotFound, match="no/key") as caught:
            read("no/key")
        assert store.url in caught.value.message


def test_keys_directly_below_a_prefix(store: ArtifactStore) -> None:
    """Keys come in ascending order, with folders among them, and nothing of what lies deeper or beside."""
    for key in ("runs/b.pb", "runs/a.pb", "runs/c/deep.pb", "runs.pb", "runs2/x"):
        store.write_bytes(key, b"")
    assert store.keys("runs") == ["runs/a.pb", "runs/b.pb", "runs/c"]
    assert store.keys("nothing") == []


def test_a_key_written_by_another_process_is_listed(store: ArtifactStore) -> None:
    """Writes of another store object are seen."""
    store.write_bytes("runs/a", b"")
    assert store.keys("runs") == ["runs/a"]
    ArtifactStore(store.url).write_bytes("runs/b", b"")
    assert store.keys("runs") == ["runs/a", "runs/b"]


@pytest.mark.parametrize("damage", [b"", b"no tensors at all", b"\xff" * 100])
def test_corrupt_arrays(damage: bytes, store: ArtifactStore) -> None:
    """Arrays that cannot be read are our defect, named by their key with what to do."""
    store.write_bytes("arrays", damage)
    with pytest.raises(Internal, match=r"arrays .*restore"):
        store.read_arrays("arrays")


def test_truncated_arrays(store: ArtifactStore) -> None:
    """Arrays that lost their end are not read as shorter ones."""
    store.write_arrays("whole", {"x": np.arange(100)})
    store.write_bytes("cut", store.read_bytes("whole")[:-8])
    with pytest.raises(Internal, match="cut"):
        store.read_arrays("cut")


def test_corrupt_message(store: ArtifactStore) -> None:
    """A record that cannot be read is our defect, named by its key."""
    store.write_bytes("run", b"\xff\xff\xff")
    with pytest.raises(Internal, match="run"):
        store.read_message("run", run_pb2.Run)


def test_a_store_that_cannot_be_reached(tmp_path: Path, store: ArtifactStore) -> None:
    """A store whose root cannot be made is Unavailable, with the setting that names it; one that can is made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="DEFUSE_STORE_URL"):
        ArtifactStore(f"file://{tmp_path}/file/store").check()
    store.check()
    assert (tmp_path / "store").is_dir()


def test_what_is_removed_is_gone(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact is removed once; somebody who removes it at the same moment does no harm."""
    store.write_bytes("a/key", b"old")
    for _ in range(2):
        store.remove("a/key")
        assert not store.exists("a/key")
    monkeypatch.setattr(store._fs, "exists", lambda _: True)  # it was there a moment ago
    store.remove("a/key")


def test_what_lies_below_a_prefix_goes(store: ArtifactStore) -> None:
    """All of it and nothing else; again it changes nothing."""
    for key in ("a/b/one", "a/b/c/two", "a/bc"):
        store.write_bytes(key, b"x")
    for _ in range(2):
        store.remove_below("a/b")
    assert store.keys("a") == ["a/bc"]
