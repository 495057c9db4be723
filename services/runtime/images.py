"""Labelled images out of a file: an `.npz` of arrays, or a zip of class folders."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from defuse.errors import InvalidInput
from PIL import Image

Array = npt.NDArray[Any]
SPLITS = ("train", "val", "test")
_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_CLASSES_FILE = "classes.txt"
# Share of the training images that becomes a split which the data does not have.
_CUT_SHARE = 0.2
MIN_SIDE, MAX_SIDE = 8, 128
# What a member of an archive raises whose bytes were changed.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)
# Modes whose values fit in bytes.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """One split."""

    images: Array  # (n, h, w, c) uint8
    labels: Array  # (n,) int64
    cut_by_seed: bool = False


@dataclass(frozen=True, kw_only=True)
class ParsedImages:
    """What a file holds."""

    splits: Mapping[str, SplitImages]
    # In the order of the labels; empty where the labels are plain class ids.
    classes: Sequence[str]


def parse_images(file: IO[bytes], *, seed: int) -> ParsedImages:
    """Read a file; cut the splits that it does not have from its training images, by seed.

    Raises InvalidInput, naming the culprit, for a file of another kind, images of mixed sizes, labels that are no class
    ids, and splits without images.
    """
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise InvalidInput("the file is neither an .npz nor a zip of class folders", reason="BAD_DATASET") from error
    names = [name for name in archive.namelist() if not name.endswith("/")]
    read = _read_npz if names and all(name.endswith(".npy") for name in names) else _read_folders
    found, classes = read(archive)
    if "train" not in found:
        raise InvalidInput(
            f"the data has no training images, only: {', '.join(found) or 'nothing'}", reason="EMPTY_SPLIT"
        )
    for name, split in found.items():
        _check_split(name, split, like=found["train"])
        _check_labels(name, split.labels, classes)
    return ParsedImages(splits=_complete(found, seed), classes=classes)


def _read_npz(archive: zipfile.ZipFile) -> tuple[dict[str, SplitImages], list[str]]:
    arrays = {}
    for name in archive.namelist():
        try:
            with archive.open(name) as member:
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
        except (ValueError, *_DAMAGED) as error:
            raise InvalidInput(f"array {name!r} cannot be read: {error}", reason="BAD_DATASET") from error
    present = [alias for alias in _ALIASES if f"x_{alias}" in arrays]
    for one, other in combinations(present, 2):
        if _ALIASES[one] == _ALIASES[other]:
            raise InvalidInput(
                f"the file has x_{one} and x_{other}, which both mean the split {_ALIASES[one]!r}; keep one of them",
                reason="BAD_DATASET",
            )
    splits = {_ALIASES[alias]: _npz_split(arrays, alias) for alias in present}
    return splits, [str(name) for name in arrays.get("class_names", [])]


def _npz_split(arrays: Mapping[str, Array], alias: str) -> SplitImages:
    images, labels = arrays[f"x_{alias}"], arrays.get(f"y_{alias}")
    if labels is None:
        raise InvalidInput(f"the file has x_{alias} but no y_{alias}", reason="BAD_DATASET")
    if images.dtype != np.uint8 or images.ndim not in {3, 4}:
        raise InvalidInput(
            f"x_{alias} is {images.dtype} of shape {images.shape}; it must be uint8 (n, h, w) or (n, h, w, c)",
            reason="BAD_DATASET",
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
        raise InvalidInput(
            f"y_{alias} is {labels.dtype} of shape {labels.shape}; it must be one whole number for each of the "
            f"{len(images)} images",
            reason="BAD_DATASET",
        )
    images = images[..., None] if images.ndim == 3 else images  # (n, h, w, c)
    return SplitImages(images=images, labels=labels.astype(np.int64))


def _read_folders(archive: zipfile.ZipFile) -> tuple[dict[str, SplitImages], list[str]]:
    files = _image_files(archive)
    classes = _declared_classes(archive) or sorted({folder for _, folder, _ in files})
    unknown = sorted({folder for _, folder, _ in files} - set(classes))
    if unknown:
        raise InvalidInput(
            f"{_CLASSES_FILE} does not name the folders {', '.join(unknown[:10])}", reason="LABELS_OUTSIDE_CLASSES"
        )
    splits = {}
    for split in SPLITS:
        members = [(folder, name) for found, folder, name in files if found == split]
        if members:
            pictures = _same_kind([(name, _picture(archive, name)) for _, name in members])
            labels = np.array([classes.index(folder) for folder, _ in members], np.int64)
            splits[split] = SplitImages(images=pictures, labels=labels)
    return splits, classes


def _image_files(archive: zipfile.ZipFile) -> list[tuple[str, str, str]]:
    """Return (split, class folder, member) of every picture; without split folders all of them are training images."""
    files = []
    around = _around(archive)
    for name in sorted(archive.namelist()):
        path = PurePosixPath(name.removeprefix(around))
        if not _is_picture(path):
            continue
        if len(path.parts) < 2:
            raise InvalidInput(f"{name!r} lies in no class folder", reason="BAD_DATASET")
        split = _ALIASES.get(path.parts[0].lower(), "train") if len(path.parts) > 2 else "train"
        files.append((split, path.parts[-2], name))
    if not files:
        raise InvalidInput("the folders hold no pictures", reason="EMPTY_SPLIT")
    return files


def _is_picture(path: PurePosixPath) -> bool:
    """Say whether a member counts; what systems hide beside pictures does not."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not hidden


def _around(archive: zipfile.ZipFile) -> str:
    """Return the folder, with its slash, that lies around the split folders; nothing where they are at the top."""
    paths = [path for path in map(PurePosixPath, archive.namelist()) if _is_picture(path) or path.name == _CLASSES_FILE]
    tops = {path.parts[0] for path in paths if path.parts}
    within = {path.parts[1].lower() for path in paths if len(path.parts) > 2}
    return f"{tops.pop()}/" if len(tops) == 1 and within & set(_ALIASES) else ""


def _declared_classes(archive: zipfile.ZipFile) -> list[str]:
    name = _around(archive) + _CLASSES_FILE
    if name not in archive.namelist():
        return []
    try:
        lines = archive.read(name).decode().splitlines()
    except (UnicodeDecodeError, *_DAMAGED) as error:
        raise InvalidInput(f"{name!r} is no text in UTF-8: {error}", reason="BAD_DATASET") from error
    return [line.strip() for line in lines if line.strip()]


def _picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(archive.read(name)))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, *_DAMAGED) as error:
        raise InvalidInput(f"{name!r} is no picture that can be read: {error}", reason="BAD_DATASET") from error
    if picture.mode not in _MODES:
        raise InvalidInput(
            f"{name!r} has values of more than eight bits (mode {picture.mode}); store it with eight",
            reason="BAD_DATASET",
        )
    return picture


def _same_kind(pictures: list[tuple[str, Image.Image]]) -> Array:
    """Return pictures as one array (n, h, w, c), gray only where all of them are."""
    first_name, first = pictures[0]
    for name, picture in pictures:
        if picture.size != first.size:
            raise InvalidInput(
                f"{name!r} has {_size(picture)} pixels, {first_name!r} has {_size(first)}; all must have one size",
                reason="MIXED_SIZES",
            )
    gray = all(picture.mode in {"1", "L", "LA"} for _, picture in pictures)
    arrays = np.stack([np.asarray(picture.convert("L" if gray else "RGB")) for _, picture in pictures])
    return arrays[..., None] if gray else arrays  # (n, h, w, c)


def _size(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"


def _check_split(name: str, split: SplitImages, *, like: SplitImages) -> None:
    height, width, channels = split.images.shape[1:]
    if not len(split.images):
        raise InvalidInput(f"split {name!r} has no images", reason="EMPTY_SPLIT")
    if split.images.shape[1:] != like.images.shape[1:]:
        raise InvalidInput(
            f"images of {name!r} are {height}x{width}x{channels}, those of 'train' "
            f"{'x'.join(str(size) for size in like.images.shape[1:])}; all images must have one size",
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
        splits[name] = SplitImages(images=train.images[rows], labels=train.labels[rows], cut_by_seed=True)
    rest = np.sort(order[len(missing) * size :])
    splits["train"] = SplitImages(images=train.images[rest], labels=train.labels[rest])
    return {name: splits[name] for name in SPLITS}
