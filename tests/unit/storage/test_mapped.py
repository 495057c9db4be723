import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from defuse.errors import Internal, NotFound

from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import mapped_arrays

TYPES = ["?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def planted() -> dict[str, npt.NDArray[Any]]:
    """Plant arrays of every type and of all shapes: large, of one number, without a dimension, without a row."""
    random = np.random.default_rng(0)
    arrays = {name: (100 * random.random((5, 3))).astype(name) for name in TYPES}
    arrays |= {"one": np.array([7]), "scalar": np.array(2.5), "no rows": np.zeros((0, 3), np.float32)}
    return arrays | {"no columns": np.zeros((4, 0), np.int32), "turned": random.random((2, 3)).T}


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """A store on this disk, and one that is elsewhere."""
    return ArtifactStore(f"{request.param}://{tmp_path}/store")


def test_mapped_arrays_are_those_that_are_read(store: ArtifactStore) -> None:
    """Mapped or read, an artifact has the same arrays, of the same types and shapes."""
    store.write_arrays("a/arrays", planted())
    mapped, read = store.map_arrays("a/arrays"), store.read_arrays("a/arrays")
    assert set(mapped) == set(read) == set(planted())
    for name, array in read.items():
        np.testing.assert_array_equal(mapped[name], array, strict=True)


def test_no_arrays_at_all(store: ArtifactStore) -> None:
    """An artifact without arrays has none."""
    store.write_arrays("none", {})
    assert store.map_arrays("none") == store.read_arrays("none") == {}


def test_rows_come_from_disk(store: ArtifactStore) -> None:
    """Nothing is read before it is used, and what is stored cannot be changed through an array."""
    store.write_arrays("arrays", {"x": np.arange(1000)})
    array = store.map_arrays("arrays")["x"]
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_not_there(kind: str, tmp_path: Path) -> None:
    """An artifact that is not there is NotFound, naming key and store, wherever the store is; it may come later."""
    store = ArtifactStore(f"{kind}://{tmp_path}/store")
    with pytest.raises(NotFound, match="no/key") as caught:
        store.map_arrays("no/key")
    assert store.url in caught.value.message
    store.write_arrays("no/key", {"x": np.arange(3)})
    assert store.map_arrays("no/key")["x"].tolist() == [0, 1, 2]


def headed(header: Any, *, size: int | None = None, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tensors at all",
        b"\xff" * 100,
        headed([]),
        headed(3),
        headed({}, size=1 << 40),
        headed({"x": 3}),
        headed({"x": {"dtype": "F32", "shape": [2]}}),
        headed({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, body=b"1234"),
        headed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, body=b"1234"),
        headed({"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, body=b"12345678"),
    ],
)
def test_a_file_of_another_kind(data: bytes, tmp_path: Path) -> None:
    """A file that holds no arrays, or not all that it promises, is our defect, named with what to do."""
    (tmp_path / "file").write_bytes(data)
    with (
        (tmp_path / "file").open("rb") as file,
        pytest.raises(Internal, match=r"the thing is not a safetensors file .*restore it from a copy"),
    ):
        mapped_arrays(file, whose="the thing")


def test_what_is_beside_the_arrays_is_left_out(tmp_path: Path) -> None:
    """Metadata is no array."""
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}
    (tmp_path / "file").write_bytes(headed({"__metadata__": {"a": "b"}, "x": entry}, body=b"\x01\x02\x03"))
    with (tmp_path / "file").open("rb") as file:
        arrays = mapped_arrays(file, whose="it")
    assert {name: array.tolist() for name, array in arrays.items()} == {"x": [2, 3]}
