import io
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.datasets.npz import PART_BYTES, ArchivedArray

Array = npt.NDArray[Any]
COUNT, ROW = 300, (100, 90)


def npy(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def archived(content: bytes) -> ArchivedArray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", content)
    return ArchivedArray(zipfile.ZipFile(buffer), "x.npy")


@pytest.fixture
def array() -> Array:
    """Return an array of more than two parts."""
    array = np.random.default_rng(0).integers(0, 256, (COUNT, *ROW), dtype=np.uint8)
    assert array.nbytes > 2 * PART_BYTES
    return array


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "rows",
    [range(COUNT), range(0), [0], [COUNT - 1], range(150), range(0, COUNT, 7), [0, 116, 117, 233, 234, COUNT - 1]],
)
def test_rows_at_any_positions(array: Array, order: Any, rows: Any) -> None:
    """Rows come in order and in parts of bounded size, wherever they lie and however the array is laid out."""
    found = archived(npy(np.asarray(array, order=order)))
    wanted = np.array(rows, np.int64)
    parts = list(found.rows(wanted))
    np.testing.assert_array_equal(np.concatenate([np.zeros((0, *ROW)), *parts]), array[wanted])
    assert all(part.nbytes <= PART_BYTES for part in parts)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_in_memory(version: tuple[int, int]) -> None:
    """A whole array is what was written, in either version of the format; bytes behind it are nobody's."""
    labels = np.arange(20).astype(">i4")
    found = archived(npy(labels, version=version) + b"more")
    assert (found.shape, found.dtype) == ((20,), labels.dtype)
    np.testing.assert_array_equal(found.whole(), labels)
    assert np.concatenate(list(found.rows(np.arange(20)))).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.arange(20))[:-1], "it holds 159 bytes, where 160 are promised"),
        (npy(np.arange(20), version=(3, 0)), r"version \(3, 0\) of the format"),
        (npy(np.array([{}], dtype=object)), "Python objects"),
        (b"no array", "magic string"),
    ],
)
def test_what_is_no_array_of_numbers(content: bytes, message: str) -> None:
    """An array that could not be read later is rejected at once, with its fault."""
    with pytest.raises(ValueError, match=message):
        archived(content)
