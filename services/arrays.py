"""Arrays, images as arrays, and the header of an array file."""

import json
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Bytes of the length field at the begin of a safetensors file.
HEADER_LENGTH_BYTES = 8


def as_floats(images: Array) -> Array:
    """Return stored images (n, h, w, c) uint8 as (n, c, h, w) float32 in [0, 1]."""
    return np.divide(images.transpose(0, 3, 1, 2), np.float32(255), dtype=np.float32, order="C")


def as_stored(images: Array) -> Array:
    """Return images (n, c, h, w) in [0, 1] as stored images (n, h, w, c) uint8.

    Values are rounded.
    """
    return np.asarray(np.rint(np.clip(images, 0, 1) * 255), np.uint8).transpose(0, 2, 3, 1)


def read_safetensors_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and its size in bytes.

    The library reads headers of named files only, without the offsets that mapping needs
    (https://huggingface.co/docs/safetensors). Raises ValueError for any other file.
    """
    size = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
    header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")  # noqa: TRY004  # what is wrong is the file
    return header, HEADER_LENGTH_BYTES + size
