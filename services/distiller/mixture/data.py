"""The data of a fit: whitened coordinates and chunks of points.

Points are in memory or mapped from disk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.distiller.mixture.covariances import CovarianceType
from services.distiller.mixture.parallel import Reducer

# Least variance of a direction, relative to that of its dimensions.
_LEAST_SHARE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The map `x -> (x - centre) @ matrix` into the coordinates of a fit.

    Results of a fit are mapped back. The map whitens the data for full covariance matrices. For diagonal ones it may
    not rotate the axes, and for spherical ones it may not stretch them.
    """

    centre: Tensor  # (d,)
    matrix: Tensor  # (d, d)
    inverse: Tensor  # (d, d)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, kind: CovarianceType) -> "Coordinates":
        """Return coordinates in which data have unit size.

        The data have this mean (d,) and definite covariance (d, d).
        """
        dim = len(mean)
        eye = torch.eye(dim, dtype=mean.dtype, device=mean.device)
        if kind in ("full", "tied"):
            root = torch.linalg.cholesky(covariance)
            return cls(
                centre=mean,
                matrix=torch.linalg.solve_triangular(root, eye, upper=False).T.contiguous(),
                inverse=root.T.contiguous(),
            )
        variance = covariance.diagonal()
        scale = variance if kind == "diag" else variance.mean().expand(dim)
        return cls(centre=mean, matrix=torch.diag(scale.rsqrt()), inverse=torch.diag(scale.sqrt()))

    def turned(self, rotation: Tensor) -> "Coordinates":
        """Return these coordinates rotated by an orthogonal matrix (d, d)."""
        return Coordinates(centre=self.centre, matrix=self.matrix @ rotation, inverse=rotation.T @ self.inverse)

    @property
    def log_determinant(self) -> float:
        """Return the log volume of the unit cube's image.

        It is the difference between log densities in both units.
        """
        return float(torch.linalg.slogdet(self.matrix)[1])

    def enter(self, x: Tensor) -> Tensor:
        """Map points (n, d) into the coordinates of the fit."""
        return (x - self.centre) @ self.matrix

    def leave(self, x: Tensor) -> Tensor:
        """Map points (n, d) back to the original coordinates."""
        return x @ self.inverse + self.centre

    def enter_covariance(self, covariance: Tensor) -> Tensor:
        """Map covariance matrices (..., d, d) into the coordinates of the fit."""
        return self.matrix.T @ covariance @ self.matrix

    def leave_covariance(self, covariance: Tensor) -> Tensor:
        """Map covariance matrices (..., d, d) back to the original coordinates."""
        return self.inverse.T @ covariance @ self.inverse


def definite(covariance: Tensor) -> Tensor:
    """Return a covariance (d, d) with some variance in every direction.

    Data may be coplanar, but a prior may not. The least variance is relative to the units of each dimension.
    """
    variance = covariance.diagonal()
    unit = torch.where(variance > 0, variance, variance.max() if bool(variance.any()) else 1.0).sqrt()
    values, vectors = torch.linalg.eigh(covariance / unit / unit[:, None])
    if float(values[0]) >= _LEAST_SHARE:
        return covariance
    raised: Tensor = (vectors * values.clamp_min(_LEAST_SHARE)) @ vectors.T * unit * unit[:, None]
    return raised


class Rows(Protocol):
    """An object that can be sliced by row, like an array (n, d).

    Examples are numpy arrays, memory maps and tensors. Slices may have strides.
    """

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Points in fit coordinates, with values of the categorical factors."""

    x: Tensor  # (b, d)
    categories: Sequence[Tensor]  # (b,) each, int64


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points, optionally with categorical factors.

    The values of a factor are from 0 to its size - 1.
    """

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
        """Yield functions that read the chunks of some or all rows.

        The functions are in the order of the chunks, and threads can call them in parallel.
        """
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

    def strided(self, stride: int) -> "Points":
        """Return every `stride`-th point, without reading a memory map."""
        return replace(self, x=self.x[::stride], categories=[values[::stride] for values in self.categories])

    def blocks(self, count: int) -> list[slice]:
        """Split the points into at most `count` parts of nearly equal size.

        The parts are consecutive, and none is empty.
        """
        edges = np.linspace(0, len(self), min(count, max(len(self), 1)) + 1).round().astype(int)
        return [slice(int(a), int(b)) for a, b in pairwise(edges) if a < b]

    def moments(self, reducer: Reducer) -> tuple[Tensor, Tensor]:
        """Return the mean (d,) and the unbiased covariance (d, d).

        Both are over the points of all processes, and need two passes. Raises ValueError for values that are not
        finite.
        """
        count, first = self._added(reducer, lambda x: (torch.ones_like(x[:, 0]).sum(), x.sum(dim=0)))
        mean = first / count
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("X holds values that are not finite: leave such points out")
        (scatter,) = self._added(reducer, lambda x: ((x - mean).T @ (x - mean),))
        return mean, scatter / (count - 1.0).clamp_min(1.0)

    def _added(self, reducer: Reducer, work: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        total: list[Tensor] = []
        for parts in reducer.each(lambda chunk: work(chunk.x), self.makers()):  # added one by one, as there may be many
            total = [so_far + part for so_far, part in zip(total, parts, strict=True)] if total else list(parts)
        return reducer.total(total)
