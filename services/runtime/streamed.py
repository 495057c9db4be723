"""Arrays on their way into a safetensors file, a part at a time: the header is known before the rows are."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from services.arrays import Array
from services.runtime.mapped import LENGTH_BYTES, TYPES

_NAMES: dict[np.dtype[Any], str] = {np.dtype(dtype): name for name, dtype in TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StreamedArray:
    """An array whose rows come in parts, in order."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    parts: Iterable[Array]

    @classmethod
    def whole(cls, array: Array) -> "StreamedArray":
        """Return an array that is in memory as one part."""
        return cls(shape=array.shape, dtype=array.dtype, parts=[array])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def write_streamed(file: IO[bytes], arrays: Mapping[str, StreamedArray]) -> None:
    """Write a safetensors file; raise ValueError where the parts of an array do not make up its shape."""
    # As the library does it: wide types first, so that each array begins at a multiple of its type.
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
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
