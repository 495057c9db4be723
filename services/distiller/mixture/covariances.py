"""The four covariance types of a component.

Each type defines the features of a point that it needs, and the moments that follow
from their sums. A component is determined by responsibility-weighted sums over points
of a feature row: 1, x, and the products that the covariance needs. The log density of a
point is linear in the same features, so an iteration is two matrix products for every
type.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

CovarianceType = Literal["full", "tied", "diag", "spherical"]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Weighted sums over the points of K components, in fit coordinates."""

    count: Tensor  # (K,)
    mean: Tensor  # (K, d)
    # (K, ...) covariance of the points of each component; (d, d) over all when tied
    covariance: Tensor


class Shape(Protocol):
    """The interface of a covariance type in d dimensions."""

    def width(self) -> int:
        """Return the number f of features of a point."""

    def features(self, x: Tensor) -> Tensor:
        """Return features (n, f) of points x (n, d)."""

    def moments(self, sums: Tensor, scatter: Tensor, count: Tensor, /) -> Moments:
        """Return moments from sums of features (K, f) and counts (K,).

        A tied covariance also needs the scatter (d, d) of all points.
        """

    def expand(self, covariance: Tensor) -> Tensor:
        """Return covariances, or matrices of their shape, as (K, d, d) or (d, d)."""

    def outer(self, difference: Tensor, weight: Tensor) -> Tensor:
        """Return the products (K, ...) of differences (K, d) with themselves.

        They are multiplied by weights (K,).
        """

    def precision_root(self, covariance: Tensor) -> Tensor:
        """Return the root U of the precision, in the covariance's shape.

        It satisfies U U^T = covariance^-1.
        """

    def log_determinant(self, root: Tensor) -> Tensor:
        """Return the log determinants (K,) or () of roots."""

    def coefficients(self, mean: Tensor, root: Tensor) -> Tensor:
        """Return the coefficients (f, K) of features in the log density.

        They give -1/2 (x - m)^T P (x - m), without the terms of `common`.
        """

    def common(self, x: Tensor, root: Tensor) -> Tensor:
        """Return the terms (n, 1) that all components have in common.

        `coefficients` leaves these terms out. They are zero unless the covariance is tied.
        """


@dataclass(frozen=True)
class Full:
    """The type in which each component has a covariance matrix (K, d, d).

    Products of pairs i <= j are packed row by row.
    """

    dim: int

    def width(self) -> int:
        return 1 + self.dim + self.dim * (self.dim + 1) // 2

    def features(self, x: Tensor) -> Tensor:
        dim, out = self.dim, x.new_empty(len(x), self.width())
        out[:, 0] = 1.0
        out[:, 1 : 1 + dim] = x
        begin = 1 + dim
        for row in range(dim):  # slices are three times as fast as two gathers
            torch.mul(x[:, row : row + 1], x[:, row:], out=out[:, begin : begin + dim - row])
            begin += dim - row
        return out

    def moments(self, sums: Tensor, _scatter: Tensor, count: Tensor) -> Moments:
        dim = self.dim
        mean = sums[:, 1 : 1 + dim] / count[:, None]
        second = _unpacked(sums[:, 1 + dim :], dim)  # (K, d, d)
        # sum r (x - m)(x - m)^T / n with m = sum r x / n; n may be slightly larger than sum r
        slack = 2.0 - (sums[:, 0] / count)[:, None, None]
        return Moments(
            count=count,
            mean=mean,
            covariance=second / count[:, None, None] - slack * mean[:, :, None] * mean[:, None, :],
        )

    def expand(self, covariance: Tensor) -> Tensor:
        return covariance

    def outer(self, difference: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None, None] * difference[:, :, None] * difference[:, None, :]

    def precision_root(self, covariance: Tensor) -> Tensor:
        return _precision_root(covariance)

    def log_determinant(self, root: Tensor) -> Tensor:
        return root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)

    def coefficients(self, mean: Tensor, root: Tensor) -> Tensor:
        precision = root @ root.mT  # (K, d, d)
        dim = self.dim
        pulled = (precision @ mean[:, :, None])[:, :, 0]  # (K, d)
        i, j = torch.triu_indices(dim, dim, device=mean.device)
        factor = torch.where(i == j, -0.5, -1.0).to(mean.dtype)
        constant = -0.5 * (pulled * mean).sum(dim=1, keepdim=True)
        return torch.cat([constant, pulled, precision[:, i, j] * factor], dim=1).T.contiguous()

    def common(self, x: Tensor, root: Tensor) -> Tensor:
        return root.new_zeros(len(x), 1)


@dataclass(frozen=True)
class Tied:
    """The type in which all components share one covariance matrix (d, d).

    Their quadratic term is therefore equal.
    """

    dim: int

    def width(self) -> int:
        return 1 + self.dim

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x], dim=1)

    def moments(self, sums: Tensor, scatter: Tensor, count: Tensor) -> Moments:
        mean = sums[:, 1:] / count[:, None]
        between = (count[:, None] * mean).T @ mean
        return Moments(count=count, mean=mean, covariance=(scatter - between) / count.sum())

    def expand(self, covariance: Tensor) -> Tensor:
        return covariance

    def outer(self, difference: Tensor, weight: Tensor) -> Tensor:
        return (weight[:, None] * difference).T @ difference

    def precision_root(self, covariance: Tensor) -> Tensor:
        return _precision_root(covariance)

    def log_determinant(self, root: Tensor) -> Tensor:
        return root.diagonal().log().sum()

    def coefficients(self, mean: Tensor, root: Tensor) -> Tensor:
        pulled = mean @ (root @ root.mT)  # (K, d)
        return torch.cat([-0.5 * (pulled * mean).sum(dim=1, keepdim=True), pulled], dim=1).T.contiguous()

    def common(self, x: Tensor, root: Tensor) -> Tensor:
        return -0.5 * ((x @ root) ** 2).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Diagonal:
    """The type in which each component has a variance per dimension (K, d)."""

    dim: int

    def width(self) -> int:
        return 1 + 2 * self.dim

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x, x * x], dim=1)

    def moments(self, sums: Tensor, _scatter: Tensor, count: Tensor) -> Moments:
        dim = self.dim
        mean = sums[:, 1 : 1 + dim] / count[:, None]
        slack = 2.0 - (sums[:, 0] / count)[:, None]
        return Moments(count=count, mean=mean, covariance=sums[:, 1 + dim :] / count[:, None] - slack * mean**2)

    def expand(self, covariance: Tensor) -> Tensor:
        return torch.diag_embed(covariance)

    def outer(self, difference: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None] * difference**2

    def precision_root(self, covariance: Tensor) -> Tensor:
        return covariance.rsqrt()

    def log_determinant(self, root: Tensor) -> Tensor:
        return root.log().sum(dim=-1)

    def coefficients(self, mean: Tensor, root: Tensor) -> Tensor:
        precision = root**2
        constant = -0.5 * (precision * mean**2).sum(dim=1, keepdim=True)
        return torch.cat([constant, precision * mean, -0.5 * precision], dim=1).T.contiguous()

    def common(self, x: Tensor, root: Tensor) -> Tensor:
        return root.new_zeros(len(x), 1)


@dataclass(frozen=True)
class Spherical:
    """The type in which each component has one variance (K,)."""

    dim: int

    def width(self) -> int:
        return 2 + self.dim

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), x, (x * x).sum(dim=1, keepdim=True)], dim=1)

    def moments(self, sums: Tensor, _scatter: Tensor, count: Tensor) -> Moments:
        dim = self.dim
        mean = sums[:, 1 : 1 + dim] / count[:, None]
        slack = 2.0 - sums[:, 0] / count
        variance = (sums[:, -1] / count - slack * (mean**2).sum(dim=1)) / dim
        return Moments(count=count, mean=mean, covariance=variance)

    def expand(self, covariance: Tensor) -> Tensor:
        return covariance[:, None, None] * torch.eye(self.dim, dtype=covariance.dtype, device=covariance.device)

    def outer(self, difference: Tensor, weight: Tensor) -> Tensor:
        return weight * (difference**2).mean(dim=1)

    def precision_root(self, covariance: Tensor) -> Tensor:
        return covariance.rsqrt()

    def log_determinant(self, root: Tensor) -> Tensor:
        return self.dim * root.log()

    def coefficients(self, mean: Tensor, root: Tensor) -> Tensor:
        precision = (root**2)[:, None]
        constant = -0.5 * precision * (mean**2).sum(dim=1, keepdim=True)
        return torch.cat([constant, precision * mean, -0.5 * precision], dim=1).T.contiguous()

    def common(self, x: Tensor, root: Tensor) -> Tensor:
        return root.new_zeros(len(x), 1)


SHAPES: dict[str, Callable[[int], Shape]] = {"full": Full, "tied": Tied, "diag": Diagonal, "spherical": Spherical}
LOG_2_PI = math.log(2 * math.pi)


def reduced(covariance: Tensor, kind: CovarianceType) -> Tensor:
    """Return the part of covariance matrices (..., d, d) that a type keeps."""
    if kind in ("full", "tied"):
        return covariance
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    return variances.contiguous() if kind == "diag" else variances.mean(dim=-1)


def _precision_root(covariance: Tensor) -> Tensor:
    root = torch.linalg.cholesky(covariance)
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse.mT


def _unpacked(packed: Tensor, dim: int) -> Tensor:
    """Return symmetric matrices (K, d, d) from packed upper triangles.

    The triangles are (K, d (d + 1) / 2).
    """
    i, j = torch.triu_indices(dim, dim, device=packed.device)
    out = packed.new_empty(len(packed), dim, dim)
    out[:, i, j] = packed
    out[:, j, i] = packed
    return out
