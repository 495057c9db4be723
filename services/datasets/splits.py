"""Splits of labelled images that stay in their file: known by shape and label, read a bounded number at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from services.arrays import Array

SPLITS = ("train", "val", "test")
ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Of images that are in memory at the same time.
PART_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """One split. The file that it comes from must be open while images are read."""

    # (h, w, c)
    image_shape: tuple[int, ...]
    labels: Array  # (n,) int64
    # Ascending positions in the file -> the images there in parts (m, h, w, c) uint8 of about `PART_BYTES`.
    read: Callable[[Array], Iterator[Array]]
    # (n,) positions of this split's images
    rows: Array
    cut_by_seed: bool = False

    def parts(self) -> Iterator[Array]:
        """Yield the images in order, some (m, h, w, c) at a time."""
        return self.read(self.rows)

    @property
    def images(self) -> Array:
        """Read all images (n, h, w, c) into memory."""
        return np.concatenate(list(self.parts()))

    def take(self, rows: Array, *, cut_by_seed: bool = False) -> "SplitImages":
        """Return the split of ascending rows of this one."""
        return replace(self, labels=self.labels[rows], rows=self.rows[rows], cut_by_seed=cut_by_seed)
