"""Labelled images of the planted benchmark, split so that near-copies stay together."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.stand import Array, Data
from services.datasets import SPLITS

SHARED = Path("/work/shared/data")
# The splits are the same for all seeds of the spots: one oracle serves them all.
_SPLIT_SEED = 0
_HELD_SHARE = 0.2
# Side, in pixels, to which the photographs in folders are resized, whatever their own sizes are.
_FOLDER_SIDE = 64
# Arrays that name the group of each training image, and whether a group's name counts within its class only.
_GROUPS = {"track_train": True, "train_image": False}


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """Split images, with the class names."""

    data: Data
    classes: tuple[str, ...]


def read_data(source: str, *, limit: int = 0) -> NamedData:
    """Read gtsrb, svhn, mnist, clothing, or the path of an `.npz`.

    GTSRB is split by track and SVHN by house photo. `clothing` is a folder of JPEGs of mixed sizes: they are resized to
    64 pixels, and all of its images are split anew, as its own test split has too few images of a class for a spot.
    `limit` keeps so many images of each split, for a short run.
    """
    path = SHARED / source if source == "clothing" else Path(source)
    if source in {"gtsrb", "svhn", "mnist"}:
        path = SHARED / f"{source}.npz"
    found = _read_folders(path) if path.is_dir() else _read_npz(path)
    return replace(found, data=_few(found.data, limit)) if limit else found


def _read_npz(path: Path) -> NamedData:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    images, labels = {"train": _with_channels(arrays["x_train"])}, {"train": arrays["y_train"].astype(np.int64)}
    shares = {"val": _HELD_SHARE}
    if "x_test" in arrays:
        given = _with_channels(arrays["x_test"])
        new = ~_copies(given, images["train"])
        images["test"], labels["test"] = given[new], arrays["y_test"][new].astype(np.int64)
    else:
        shares["test"] = _HELD_SHARE
    parts = split_groups(labels["train"], _groups(arrays, labels["train"]), shares)
    names = [str(name) for name in arrays.get("class_names", [])]
    return _named(path.stem, images, labels, parts, names)


def _read_folders(path: Path) -> NamedData:
    files = sorted(path.glob("*/*/*.*"))
    names = sorted({file.parent.name for file in files})
    images = np.stack([_resized(file) for file in files])
    labels = np.array([names.index(file.parent.name) for file in files], np.int64)
    parts = split_groups(labels, np.arange(len(labels)), {"val": _HELD_SHARE, "test": _HELD_SHARE})
    return _named(path.name, {"train": images}, {"train": labels}, parts, names)


def _named(
    name: str, images: dict[str, Array], labels: dict[str, Array], parts: Mapping[str, Array], names: list[str]
) -> NamedData:
    """Cut the training images into parts, and name the classes."""
    whole_images, whole_labels = images["train"], labels["train"]
    images = images | {split: whole_images[rows] for split, rows in parts.items()}
    labels = labels | {split: whole_labels[rows] for split, rows in parts.items()}
    data = Data(
        name=name,
        images={split: images[split] for split in SPLITS},
        labels={split: labels[split] for split in SPLITS},
    )
    return NamedData(data=data, classes=tuple(names or map(str, range(data.classes))))


def split_groups(labels: Array, groups: Array, shares: Mapping[str, float]) -> dict[str, Array]:
    """Return ascending rows of each part; no group is in two parts.

    `shares` are those of the parts beside `train`, which has the rest. Groups are drawn within the class of their first
    image, so that every class has its share in every part.
    """
    random = np.random.default_rng(_SPLIT_SEED)
    unique, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    part_of_group = np.full(len(unique), "train", object)
    for label in np.unique(labels[first]):
        members = random.permutation(np.flatnonzero(labels[first] == label))
        begin = 0
        for part, share in shares.items():
            end = begin + max(1, round(share * len(members)))
            part_of_group[members[begin:end]] = part
            begin = end
    part_of_image = part_of_group[group_of.reshape(-1)]
    return {part: np.flatnonzero(part_of_image == part) for part in ("train", *shares)}


def _groups(arrays: Mapping[str, Array], labels: Array) -> Array:
    """Return the group of each training image.

    Without group names, each image is its own.
    """
    for name, within_class in _GROUPS.items():
        if name in arrays:
            groups = arrays[name].astype(np.int64)
            return groups * (1 + int(labels.max())) + labels if within_class else groups
    return np.arange(len(labels))


def _copies(images: Array, of: Array) -> Array:
    """Say which images are byte-identical to one of the others, (n,)."""
    known = {hashlib.sha256(image.tobytes()).digest() for image in of}
    return np.array([hashlib.sha256(image.tobytes()).digest() in known for image in images], bool)


def _with_channels(images: Array) -> Array:
    return images if images.ndim == 4 else images[..., None]


def _resized(file: Path) -> Array:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((_FOLDER_SIDE, _FOLDER_SIDE), Image.Resampling.BILINEAR))


def _few(data: Data, limit: int) -> Data:
    random = np.random.default_rng(_SPLIT_SEED)
    kept = {split: np.sort(random.permutation(len(labels))[:limit]) for split, labels in data.labels.items()}
    return replace(
        data,
        images={split: images[kept[split]] for split, images in data.images.items()},
        labels={split: labels[kept[split]] for split, labels in data.labels.items()},
    )
