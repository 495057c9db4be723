"""Arrays of a safetensors file, mapped: their pages come from disk when they are touched, and can go again."""

import json
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from defuse.errors import Internal

LENGTH_BYTES = 8
# https://huggingface.co/docs/safetensors: the types that artifacts have.
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
    """Return the arrays of an open file, read-only; raise Internal for another kind, naming `whose`.

    The file may be closed, and even be removed, while its arrays are in use.
    """
    try:
        size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(size))
        return {
            name: _mapped(file, LENGTH_BYTES + size, entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise Internal(f"{whose} is not a safetensors file ({error}); restore it from a copy") from error


def _mapped(file: BinaryIO, offset: int, entry: dict[str, Any]) -> npt.NDArray[Any]:
    dtype, shape = TYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    begin, _ = entry["data_offsets"]
    return np.memmap(file, dtype, mode="r", offset=offset + begin, shape=shape)
