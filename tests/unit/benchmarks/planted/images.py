"""Images of the planted benchmark's tests."""

from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.planted.data import split_groups
from benchmarks.stand import Data

Array = npt.NDArray[Any]
SIDE = 16


def stroke(*, width: int = 2, lean: float = 0.0, length: int = 10, value: int = 200) -> Array:
    """Draw an upright stroke on black, (h, w, 1); `lean` moves each lower row to the right."""
    image = np.zeros((32, 32, 1), np.uint8)
    for row in range(length):
        left = round(16 - width / 2 + lean * (row - length / 2))
        image[16 - length // 2 + row, left : left + width] = value
    return image


def noisy(seed: int = 0, *, channels: int = 3) -> Array:
    return np.random.default_rng(seed).integers(60, 190, (32, 32, channels)).astype(np.uint8)


def photographs(per_class: int = 200, classes: int = 5, *, seed: int = 0) -> Data:
    """Return colour images in splits of 60, 20 and 20 %, each class with a spread of every attribute."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    light = random.uniform(0.4, 1.4, (len(labels), 1, 1, 3))
    images = random.integers(20, 150, (len(labels), SIDE, SIDE, 3)) * light
    images = np.clip(images, 0, 255).astype(np.uint8)
    parts = split_groups(labels, np.arange(len(labels)), {"val": 0.2, "test": 0.2})
    return Data(
        name="photographs",
        images={split: images[rows] for split, rows in parts.items()},
        labels={split: labels[rows] for split, rows in parts.items()},
    )


def flat(images: Array) -> Array:
    return images.reshape(len(images), -1).astype(np.float64)
