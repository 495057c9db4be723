"""Arrays in safetensors files: mapped reading, streamed writing, and groups.

A mapped array is read from disk page by page, and its pages can be evicted again. A streamed array is written a part at
a time, since its header is known before its rows are.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from defuse.errors import Internal

from services.arrays import HEADER_LENGTH_BYTES, Array, read_safetensors_header

# The types of artifacts: https://huggingface.co/docs/safetensors.
TYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


def mapped_arrays(file: BinaryIO, *, whose: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an open file, read-only.

    The file may be closed, and even deleted, while its arrays are in use. Raises Internal, naming `whose`, for a file
    of another kind.
    """
    try:
        header, offset = read_safetensors_header(file)
        return {name: _mapped(file, offset, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise Internal(f"{whose} is not a safetensors file ({error}); restore it from a copy") from error


def _mapped(file: BinaryIO, offset: int, entry: dict[str, Any]) -> npt.NDArray[Any]:
    dtype, shape = TYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape:
        return np.zeros(shape, dtype)  # an empty array cannot be mapped
    begin, _ = entry["data_offsets"]
    return np.memmap(file, dtype, mode="r", offset=offset + begin, shape=shape)


_NAMES: dict[np.dtype[Any], str] = {np.dtype(dtype): name for name, dtype in TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StreamedArray:
    """An array whose rows arrive in parts, in order."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    parts: Iterable[Array]

    @classmethod
    def whole(cls, array: Array) -> "StreamedArray":
        """Return a streamed array of one part, which is in memory."""
        return cls(shape=array.shape, dtype=array.dtype, parts=[array])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write_streamed(file: IO[bytes], arrays: Mapping[str, StreamedArray]) -> None:
    """Write a safetensors file from parts of arrays.

    Raises ValueError when the parts of an array do not fill its shape.
    """
    # Wide types first, as in the library, so that each array is aligned.
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    file.write(_header({name: arrays[name] for name in names}))
    for name in names:
        written, array = 0, arrays[name]
        for part in array.parts:
            written += file.write(np.ascontiguousarray(part, array.dtype).data)
        if written != array.nbytes:
            raise ValueError(f"{name} has {written} bytes in parts, where its shape {array.shape} needs {array.nbytes}")


def _header(arrays: Mapping[str, StreamedArray]) -> bytes:
    header, begin = {}, 0
    for name, array in arrays.items():
        end = begin + array.nbytes
        header[name] = {"dtype": _NAMES[np.dtype(array.dtype)], "shape": array.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_LENGTH_BYTES)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


Arrays = Mapping[str, npt.NDArray[Any]]


def join_groups(**groups: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of all groups, named `group.name`."""
    return {f"{group}.{name}": np.asarray(array) for group, arrays in groups.items() for name, array in arrays.items()}


def select_group(arrays: Arrays, wanted: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of one group, by name."""
    prefix = f"{wanted}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
