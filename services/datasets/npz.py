"""Splits of labelled images, read from an `.npz` in bounded memory.

An `.npz` is a zip of `.npy` files, in which the rows of an array follow one another.
"""

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import IO, Any

import numpy as np
from defuse.errors import InvalidInput

from services.arrays import Array
from services.storage.file_systems import append_chunk, scratch_file

SPLITS = ("train", "val", "test")
ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Bytes of images that are in memory at once.
PART_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SplitImages:
    """One split of labelled images.

    Its file must stay open while images are read.
    """

    # (h, w, c)
    image_shape: tuple[int, ...]
    labels: Array  # (n,) int64
    # Maps ascending positions in the file to the images there, in parts (m, h, w, c) uint8 of about `PART_BYTES`.
    read: Callable[[Array], Iterator[Array]]
    # (n,) positions of this split's images
    rows: Array
    cut_by_seed: bool = False

    def parts(self) -> Iterator[Array]:
        """Yield the images (n, h, w, c) in order, in parts (m, h, w, c)."""
        return self.read(self.rows)

    @property
    def images(self) -> Array:
        """Return all images (n, h, w, c) in memory."""
        return np.concatenate(list(self.parts()))

    def take(self, rows: Array, *, cut_by_seed: bool = False) -> "SplitImages":
        """Return the subset at ascending rows of this split."""
        return replace(self, labels=self.labels[rows], rows=self.rows[rows], cut_by_seed=cut_by_seed)


# Exceptions of a damaged archive member.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArchivedArray:
    """An array that is read completely when the object is created.

    Later reads therefore cannot fail on damage. Raises one of `DAMAGED`, or ValueError for anything but an array of
    numbers.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        with archive.open(name) as member:
            self.shape, self._in_columns, self.dtype = _header(member)
            size = sum(map(len, _chunks(member)))
        promised = math.prod(self.shape) * self.dtype.itemsize
        if size < promised:
            raise ValueError(f"it holds {size} bytes, where {promised} are promised")

    def whole(self) -> Array:
        """Return the whole array in memory."""
        with self._archive.open(self._name) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
        return array

    def rows(self, wanted: Array) -> Iterator[Array]:
        """Yield the rows at ascending positions, in parts of bounded size.

        A part has as many rows as fit in `PART_BYTES`, and at least one.
        """
        begin = 0
        for part in self._scattered() if self._in_columns else self._consecutive():
            first, last = np.searchsorted(wanted, (begin, begin + len(part)))
            if first < last:
                yield part[wanted[first:last] - begin]
            begin += len(part)

    def _consecutive(self) -> Iterator[Array]:
        with self._archive.open(self._name) as member:
            _header(member)
            for part in self._slices():
                count = part.stop - part.start
                data = member.read(count * self._row_bytes)
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _scattered(self) -> Iterator[Array]:
        return (self._mapped[part] for part in self._slices())

    @cached_property
    def _mapped(self) -> Array:
        # In Fortran order, every row is spread over the member, which needs random access: a file, not a stream.
        with scratch_file() as file, self._archive.open(self._name) as member:
            _header(member)
            for chunk in _chunks(member):
                append_chunk(file, chunk)
            return np.memmap(file, self.dtype, mode="r", shape=self.shape, order="F")

    def _slices(self) -> Iterator[slice]:
        count, step = self.shape[0], max(1, PART_BYTES // self._row_bytes)
        return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and type of an array.

    The array's bytes follow in the file.
    """
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(
            f"it has version {version} of the format, where 1.0 and 2.0 are read; save it again with numpy"
        )
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = _HEADERS[version](member)
    if header[2].hasobject:
        raise ValueError("it holds Python objects, which could run code; save it as numbers or text")
    return header


def _chunks(member: IO[bytes]) -> Iterator[bytes]:
    while chunk := member.read(PART_BYTES):
        yield chunk


def read_npz(archive: zipfile.ZipFile) -> tuple[dict[str, SplitImages], list[str]]:
    """Return the splits of the file, and its class names, if any."""
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
