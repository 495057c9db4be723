"""Splits out of an `.npz`: `x_train`, `y_train` and so on."""

import zipfile
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
from defuse.errors import InvalidInput

from services.arrays import Array
from services.runtime.images.archived_array import DAMAGED, ArchivedArray
from services.runtime.images.splits import ALIASES, SplitImages


def read_npz(archive: zipfile.ZipFile) -> tuple[dict[str, SplitImages], list[str]]:
    """Return the splits that the file has, and its class names where it has any."""
    arrays = {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
    present = [alias for alias in ALIASES if f"x_{alias}" in arrays]
    for one, other in combinations(present, 2):
        if ALIASES[one] == ALIASES[other]:
            raise InvalidInput(
                f"the file has x_{one} and x_{other}, which both mean the split {ALIASES[one]!r}; keep one of them",
                reason="BAD_DATASET",
            )
    splits = {ALIASES[alias]: _split(arrays, alias) for alias in present}
    classes = [str(name) for name in arrays["class_names"].whole()] if "class_names" in arrays else []
    return splits, classes


def _array(archive: zipfile.ZipFile, name: str) -> ArchivedArray:
    try:
        return ArchivedArray(archive, name)
    except (ValueError, *DAMAGED) as error:
        raise InvalidInput(f"array {name!r} cannot be read: {error}", reason="BAD_DATASET") from error


def _split(arrays: Mapping[str, ArchivedArray], alias: str) -> SplitImages:
    images, labels = arrays[f"x_{alias}"], arrays.get(f"y_{alias}")
    if labels is None:
        raise InvalidInput(f"the file has x_{alias} but no y_{alias}", reason="BAD_DATASET")
    if images.dtype != np.uint8 or len(images.shape) not in {3, 4}:
        raise InvalidInput(
            f"x_{alias} is {images.dtype} of shape {images.shape}; it must be uint8 (n, h, w) or (n, h, w, c)",
            reason="BAD_DATASET",
        )
    count, *shape = images.shape if len(images.shape) == 4 else (*images.shape, 1)  # (n, h, w, c)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidInput(
            f"y_{alias} is {labels.dtype} of shape {labels.shape}; it must be one whole number for each of the "
            f"{count} images",
            reason="BAD_DATASET",
        )

    def read(rows: Array) -> Iterator[Array]:
        for part in images.rows(rows):
            yield part.reshape(-1, *shape)  # (m, h, w, c)

    return SplitImages(
        image_shape=tuple(shape), labels=labels.whole().astype(np.int64), read=read, rows=np.arange(count)
    )
