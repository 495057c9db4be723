from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import StreamedArray

Array = npt.NDArray[Any]


def in_parts(array: Array, size: int) -> StreamedArray:
    parts = (array[begin : begin + size] for begin in range(0, len(array), size))
    return StreamedArray(shape=array.shape, dtype=array.dtype, parts=parts)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_file_in_parts_is_the_file_in_one_piece(store: ArtifactStore, size: int) -> None:
    """However the rows are cut, the bytes are those that the library writes of the whole arrays."""
    random = np.random.default_rng(0)
    arrays = {
        "bytes": random.integers(0, 256, (7, 3, 5), dtype=np.uint8),
        "labels": np.arange(7),
        "floats": random.random((7, 2)).astype(np.float32),
        "turned": random.random((2, 7)).T,
        "none": np.zeros((0, 4), np.int16),
    }
    store.write_streamed("arrays", {name: in_parts(array, size) for name, array in arrays.items()})
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    assert store.read_bytes("arrays") == safetensors.numpy.save(contiguous)


@pytest.mark.parametrize("rows", [6, 8])
def test_parts_that_do_not_make_up_the_array(store: ArtifactStore, rows: int) -> None:
    """Rows that are missing or too many leave no artifact, since its header would lie."""
    array = StreamedArray(shape=(7, 2), dtype=np.int64, parts=[np.zeros((rows, 2), np.int64)])
    with pytest.raises(ValueError, match=rf"x has {16 * rows} bytes in parts.*\(7, 2\) needs 112"):
        store.write_streamed("arrays", {"x": array})
    assert not store.exists("arrays")
