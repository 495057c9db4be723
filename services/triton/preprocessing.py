"""Value preprocessing, from stored pixels to a classifier's input.

The owner of the classifier declares it.
"""

from typing import Any

import numpy as np
from defuse.v1 import model_pb2

from services.arrays import Array, as_stored


def no_logits(model: model_pb2.Model) -> Array:
    """Return the logits (0, k) of no images."""
    return np.zeros((0, len(model.classes)), np.float32)


def input_shape(shape: tuple[int, ...], model: model_pb2.Model) -> tuple[int, ...]:
    """Return the shape of the classifier's input for images of shape (n, c, h, w)."""
    n, c, h, w = shape
    return (n, h, w, c) if _channels_last(model) else (n, c, h, w)


def preprocess(images: Any, model: model_pb2.Model, *, out: Any = None) -> Any:
    """Return the classifier's input for images (n, c, h, w) in [0, 1].

    The model declares the map. The result is written to `out` when that is given. The function accepts numpy arrays and
    torch tensors.
    """
    if out is None:
        out = np.empty(input_shape(images.shape, model), np.uint8 if model.input_datatype == "UINT8" else np.float32)
    target = out.swapaxes(1, 3).swapaxes(2, 3) if _channels_last(model) else out  # (n, c, h, w)
    if model.input_datatype == "UINT8":
        scaled = images * 1.0  # a copy: bytes cannot hold values before rounding
        _normalise(scaled, model.preprocessing)
        target[...] = scaled.clip(0, 255).round()
    else:
        target[...] = images
        _normalise(target, model.preprocessing)
    return out


def undo_preprocessing(inputs: Array, model: model_pb2.Model) -> Array:
    """Return stored images (n, h, w, c) uint8, the inverse of `preprocess`.

    They are correct to the nearest byte.
    """
    pixels = inputs.astype(np.float32)
    if _channels_last(model):
        pixels = pixels.transpose(0, 3, 1, 2)  # (n, c, h, w)
    declared = model.preprocessing
    for channel, (mean, std) in enumerate(zip(declared.mean, declared.std, strict=True)):
        pixels[:, channel] *= std
        pixels[:, channel] += mean
    return as_stored((pixels - np.float32(declared.low)) / np.float32(declared.high - declared.low))


def _normalise(pixels: Any, declared: model_pb2.Preprocessing) -> None:
    """Normalise pixels (n, c, h, w) in place.

    The map is from [0, 1] to the declared range, mean and standard deviation.
    """
    if declared.high - declared.low != 1:
        pixels *= declared.high - declared.low
    if declared.low:
        pixels += declared.low
    for channel, (mean, std) in enumerate(zip(declared.mean, declared.std, strict=True)):
        pixels[:, channel] -= mean
        pixels[:, channel] /= std


def _channels_last(model: model_pb2.Model) -> bool:
    return model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NHWC
