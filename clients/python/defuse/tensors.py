"""Conversion of arrays to protobuf and back."""

import math

import numpy as np
import numpy.typing as npt

from defuse.errors import InvalidInput
from defuse.v1 import tensor_pb2


def images_to_proto(images: npt.NDArray[np.uint8]) -> tensor_pb2.ImageTensor:
    """Return the message of images (n, h, w, c) uint8."""
    return tensor_pb2.ImageTensor(shape=images.shape, data=np.ascontiguousarray(images, dtype=np.uint8).tobytes())


def images_from_proto(message: tensor_pb2.ImageTensor) -> npt.NDArray[np.uint8]:
    """Return the images (n, h, w, c) uint8 of a message.

    A message without a shape has no images. Raises InvalidInput if shape and bytes disagree.
    """
    if not message.shape:
        return np.zeros((0, 0, 0, 0), np.uint8)
    if len(message.shape) != 4 or min(message.shape) < 0 or math.prod(message.shape) != len(message.data):
        raise InvalidInput(
            f"images of shape {tuple(message.shape)} need {math.prod(message.shape)} bytes in four dimensions "
            f"(n, h, w, c); the message holds {len(message.data)}"
        )
    return np.frombuffer(message.data, np.uint8).reshape(tuple(message.shape))


def floats_to_proto(values: npt.NDArray[np.floating]) -> tensor_pb2.FloatTensor:
    """Return the message of an array of any shape, as float32."""
    return tensor_pb2.FloatTensor(shape=values.shape, data=np.ascontiguousarray(values, dtype="<f4").tobytes())


def floats_from_proto(message: tensor_pb2.FloatTensor) -> npt.NDArray[np.float32]:
    """Return the float32 array of a message, writable.

    Raises InvalidInput if shape and bytes disagree.
    """
    if min(message.shape, default=0) < 0 or 4 * math.prod(message.shape) != len(message.data):
        raise InvalidInput(
            f"a tensor of shape {tuple(message.shape)} needs {4 * math.prod(message.shape)} bytes; "
            f"the message holds {len(message.data)}"
        )
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape)).astype(np.float32)
