"""Splits from a zip of class folders, optionally below split folders."""

import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
from defuse.errors import InvalidInput
from PIL import Image

from services.arrays import Array
from services.datasets.npz import ALIASES, DAMAGED, PART_BYTES, SPLITS, SplitImages

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_CLASSES_FILE = "classes.txt"
# Modes whose values fit in bytes.
_GRAY = {"1", "L", "LA"}
_MODES = _GRAY | {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def read_folders(archive: zipfile.ZipFile) -> tuple[dict[str, SplitImages], list[str]]:
    """Return the splits of the folders, and the classes in label order."""
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
            labels = np.array([classes.index(folder) for folder, _ in members], np.int64)
            splits[split] = _split(archive, [name for _, name in members], labels)
    return splits, classes


def _split(archive: zipfile.ZipFile, names: Sequence[str], labels: Array) -> SplitImages:
    (width, height), mode = _kind(archive, names)
    shape = (height, width, Image.getmodebands(mode))

    def read(rows: Array) -> Iterator[Array]:
        step = max(1, PART_BYTES // math.prod(shape))
        for begin in range(0, len(rows), step):
            pictures = [_picture(archive, names[row]).convert(mode) for row in rows[begin : begin + step]]
            yield np.stack([np.asarray(picture) for picture in pictures]).reshape(-1, *shape)  # (m, h, w, c)

    return SplitImages(image_shape=shape, labels=labels, read=read, rows=np.arange(len(names)))


def _image_files(archive: zipfile.ZipFile) -> list[tuple[str, str, str]]:
    """Return split, class folder and member of every image.

    Without split folders, all are training images.
    """
    files = []
    around = _around(archive)
    for name in sorted(archive.namelist()):
        path = PurePosixPath(name.removeprefix(around))
        if not _is_picture(path):
            continue
        if len(path.parts) < 2:
            raise InvalidInput(f"{name!r} lies in no class folder", reason="BAD_DATASET")
        split = ALIASES.get(path.parts[0].lower(), "train") if len(path.parts) > 2 else "train"
        files.append((split, path.parts[-2], name))
    if not files:
        raise InvalidInput("the folders hold no pictures", reason="EMPTY_SPLIT")
    return files


def _is_picture(path: PurePosixPath) -> bool:
    """Return whether a member is an image.

    Hidden files of operating systems are not.
    """
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in _SUFFIXES and not hidden


def _around(archive: zipfile.ZipFile) -> str:
    """Return the folder around the split folders, with its slash.

    The result is empty when they are at the top.
    """
    paths = [path for path in map(PurePosixPath, archive.namelist()) if _is_picture(path) or path.name == _CLASSES_FILE]
    tops = {path.parts[0] for path in paths if path.parts}
    within = {path.parts[1].lower() for path in paths if len(path.parts) > 2}
    return f"{tops.pop()}/" if len(tops) == 1 and within & set(ALIASES) else ""


def _declared_classes(archive: zipfile.ZipFile) -> list[str]:
    name = _around(archive) + _CLASSES_FILE
    if name not in archive.namelist():
        return []
    try:
        lines = archive.read(name).decode().splitlines()
    except (UnicodeDecodeError, *DAMAGED) as error:
        raise InvalidInput(f"{name!r} is no text in UTF-8: {error}", reason="BAD_DATASET") from error
    return [line.strip() for line in lines if line.strip()]


def _picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(archive.read(name)))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, *DAMAGED) as error:
        raise InvalidInput(f"{name!r} is no picture that can be read: {error}", reason="BAD_DATASET") from error
    if picture.mode not in _MODES:
        raise InvalidInput(
            f"{name!r} has values of more than eight bits (mode {picture.mode}); store it with eight",
            reason="BAD_DATASET",
        )
    return picture


def _kind(archive: zipfile.ZipFile, names: Sequence[str]) -> tuple[tuple[int, int], str]:
    """Return the common size of all images, and their mode.

    The size is width and height. The mode is gray only when all images are gray.
    """
    first, modes = _picture(archive, names[0]), set()
    for name in names:
        picture = _picture(archive, name)
        modes.add(picture.mode)
        if picture.size != first.size:
            raise InvalidInput(
                f"{name!r} has {_size(picture)} pixels, {names[0]!r} has {_size(first)}; all must have one size",
                reason="MIXED_SIZES",
            )
    return first.size, "L" if modes <= _GRAY else "RGB"


def _size(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"
