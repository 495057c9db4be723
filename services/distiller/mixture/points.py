"""The data of a fit, read a chunk at a time: arrays in memory, or mapped from disk, however many points they hold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.distiller.mixture.coordinates import Coordinates
from services.distiller.mixture.together import Crew


class Rows(Protocol):
    """Anything that is sliced by row, also in steps, like an array (n, d): numpy's, a memory map, a tensor."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some points in the coordinates of a fit, with the values of their categorical factors."""

    x: Tensor  # (b, d)
    categories: Sequence[Tensor]  # (b,) each, int64


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points, perhaps with categorical factors, of which each has a value from 0 to its size - 1."""

    x: Rows  # (n, d)
    categories: Sequence[npt.NDArray[np.integer]]  # (n,) each
    sizes: Sequence[int]
    chunk_size: int
    device: torch.device
    coordinates: Coordinates | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def dim(self) -> int:
        return int(self.x.shape[1])

    def makers(self, rows: slice | None = None) -> Iterator[Callable[[], Chunk]]:
        """Yield what reads the chunks of some rows, or of all, in order; so that threads may read side by side."""
        begin, end, _ = (rows or slice(None)).indices(len(self))
        for first in range(begin, end, self.chunk_size):
            part = slice(first, min(first + self.chunk_size, end))
            yield lambda part=part: self.read(part)  # type: ignore[misc]  # mypy knows no default of a lambda

    def read(self, rows: slice) -> Chunk:
        x = torch.as_tensor(np.asarray(self.x[rows], dtype=np.float64)).to(self.device)
        return Chunk(
            x=self.coordinates.enter(x) if self.coordinates else x,
            categories=[
                torch.as_tensor(np.asarray(values[rows], dtype=np.int64)).to(self.device) for values in self.categories
            ],
        )

    def thinned(self, stride: int) -> "Points":
        """Return every so-manieth point; of a memory map nothing is read yet."""
        return replace(self, x=self.x[::stride], categories=[values[::stride] for values in self.categories])

    def blocks(self, count: int) -> list[slice]:
        """Cut the points into at most `count` consecutive parts of nearly equal size, none without points."""
        edges = np.linspace(0, len(self), min(count, max(len(self), 1)) + 1).round().astype(int)
        return [slice(int(a), int(b)) for a, b in pairwise(edges) if a < b]

    def moments(self, crew: Crew) -> tuple[Tensor, Tensor]:
        """Return the mean (d,) and the unbiased covariance (d, d) of the points of all processes, in two passes.

        Raises ValueError for values that are not finite.
        """
        count, first = self._added(crew, lambda x: (torch.ones_like(x[:, 0]).sum(), x.sum(dim=0)))
        mean = first / count
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("X holds values that are not finite: leave such points out")
        (scatter,) = self._added(crew, lambda x: ((x - mean).T @ (x - mean),))
        return mean, scatter / (count - 1.0).clamp_min(1.0)

    def _added(self, crew: Crew, work: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        total: list[Tensor] = []
        for parts in crew.each(lambda chunk: work(chunk.x), self.makers()):  # added one by one: there may be many
            total = [so_far + part for so_far, part in zip(total, parts, strict=True)] if total else list(parts)
        return crew.total(total)
