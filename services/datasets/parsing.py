"""The splits of a data set file, checked and completed."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from defuse.errors import InvalidInput

from services.arrays import Array
from services.datasets.folders import read_folders
from services.datasets.npz import SPLITS, SplitImages, read_npz

# Share of the training images that becomes a missing split.
_CUT_SHARE = 0.2
MIN_SIDE, MAX_SIDE = 8, 128


@dataclass(frozen=True, kw_only=True)
class ParsedImages:
    """The splits and the classes of a file."""

    splits: Mapping[str, SplitImages]
    # In the order of the labels; empty when the labels are plain class ids.
    classes: Sequence[str]


def parse_images(file: IO[bytes], *, seed: int) -> ParsedImages:
    """Return the splits and the classes of a file.

    Missing splits are cut from its training images, by seed. The whole file is read once and checked, and only labels
    are kept: images are read again on demand.

    Raises InvalidInput, naming the cause, for a file of another kind, images of mixed sizes, labels that are no class
    ids, and splits without images.
    """
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise InvalidInput("the file is neither an .npz nor a zip of class folders", reason="BAD_DATASET") from error
    names = [name for name in archive.namelist() if not name.endswith("/")]
    read = read_npz if names and all(name.endswith(".npy") for name in names) else read_folders
    found, classes = read(archive)
    if "train" not in found:
        raise InvalidInput(
            f"the data has no training images, only: {', '.join(found) or 'nothing'}", reason="EMPTY_SPLIT"
        )
    for name, split in found.items():
        _check_split(name, split, like=found["train"])
        _check_labels(name, split.labels, classes)
    return ParsedImages(splits=_complete(found, seed), classes=classes)


def _check_split(name: str, split: SplitImages, *, like: SplitImages) -> None:
    height, width, channels = split.image_shape
    if not len(split.labels):
        raise InvalidInput(f"split {name!r} has no images", reason="EMPTY_SPLIT")
    if split.image_shape != like.image_shape:
        raise InvalidInput(
            f"images of {name!r} are {height}x{width}x{channels}, those of 'train' "
            f"{'x'.join(str(size) for size in like.image_shape)}; all images must have one size",
            reason="MIXED_SIZES",
        )
    if channels not in {1, 3} or not all(MIN_SIDE <= side <= MAX_SIDE for side in (height, width)):
        raise InvalidInput(
            f"images are {height}x{width}x{channels}; sides of {MIN_SIDE} to {MAX_SIDE} pixels and 1 or 3 channels are "
            "supported",
            reason="BAD_IMAGE_SHAPE",
        )


def _check_labels(name: str, labels: Array, classes: Sequence[str]) -> None:
    if labels.min() < 0:
        raise InvalidInput(f"split {name!r} has label {labels.min()}; labels start at 0", reason="BAD_DATASET")
    if classes and labels.max() >= len(classes):
        raise InvalidInput(
            f"split {name!r} has label {labels.max()}, but there are {len(classes)} class names, for labels from 0",
            reason="LABELS_OUTSIDE_CLASSES",
        )


def _complete(found: dict[str, SplitImages], seed: int) -> dict[str, SplitImages]:
    missing = [name for name in SPLITS if name not in found]
    train = found["train"]
    size = int(len(train.labels) * _CUT_SHARE)
    if missing and size == 0:
        raise InvalidInput(
            f"{len(train.labels)} training images are too few to cut {' and '.join(missing)} from; add images",
            reason="EMPTY_SPLIT",
        )
    order = np.random.default_rng(seed).permutation(len(train.labels))
    splits = dict(found)
    for position, name in enumerate(missing):
        rows = np.sort(order[position * size : (position + 1) * size])
        splits[name] = train.take(rows, cut_by_seed=True)
    splits["train"] = train.take(np.sort(order[len(missing) * size :]))
    return {name: splits[name] for name in SPLITS}
