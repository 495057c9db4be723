"""What a program logs itself: an image with its scores, and what an image really shows."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from defuse.hooks.buffer import OBSERVATIONS, TRUTHS
from defuse.hooks.drops import Dropped
from defuse.hooks.observation import Observation

# Bytes as the model takes them, real numbers as the model takes them, or a stored picture (h, w, c) of uint8.
Image: TypeAlias = bytes | npt.NDArray[Any] | None
_OVERHEAD_BYTES = 200


@dataclass(frozen=True, slots=True)
class Logged:
    """An observation that is one already."""

    observation: Observation
    kind: str = OBSERVATIONS

    @property
    def count(self) -> int:
        return 1

    @property
    def size(self) -> int:
        one = self.observation
        return len(one.input) + len(one.picture) + 8 * len(one.scores) + _OVERHEAD_BYTES

    def observations(self) -> list[Observation]:
        return [self.observation]


@dataclass(frozen=True, slots=True)
class Truth:
    """What an observation really shows."""

    model: str
    id: str
    label: str
    kind: str = TRUTHS

    @property
    def count(self) -> int:
        return 1

    @property
    def size(self) -> int:
        return len(self.id) + len(self.label) + _OVERHEAD_BYTES


def content_of(image: Image) -> dict[str, Any]:
    """Return the fields of an observation that hold an image, copied: its owner may write over it.

    Raises Dropped for an array that is no image.
    """
    if image is None:
        return {}
    if isinstance(image, bytes):
        return {"input": image}
    array = np.asarray(image)
    if array.dtype == np.uint8:
        return {"picture": array.tobytes(), "shape": array.shape, "datatype": "UINT8"}
    if np.issubdtype(array.dtype, np.floating):
        return {"input": array.astype("<f4").tobytes(), "shape": array.shape, "datatype": "FP32"}
    raise Dropped(
        "bad_image", f"an image of {array.dtype} is neither uint8 nor real numbers; convert it, or give bytes"
    )
