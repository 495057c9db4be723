"""The coordinates of a fit: centred and scaled, so that squares lose no digits whatever the units of the data are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.distiller.mixture.covariances import CovarianceType

# Least variance of a direction beside that of the dimensions it lies in.
_LEAST_SHARE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The map `x -> (x - centre) @ matrix`; what leaves a fit is mapped back.

    It whitens where components have whole covariance matrices. Where they have variances, it may not turn the axes, and
    where they have one variance, it may not stretch them.
    """

    centre: Tensor  # (d,)
    matrix: Tensor  # (d, d)
    inverse: Tensor  # (d, d)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, kind: CovarianceType) -> "Coordinates":
        """Return coordinates in which data of this mean (d,) and definite covariance (d, d) has unit size."""
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
        """Return these coordinates turned by an orthogonal matrix (d, d)."""
        return Coordinates(centre=self.centre, matrix=self.matrix @ rotation, inverse=rotation.T @ self.inverse)

    @property
    def log_determinant(self) -> float:
        """Log of the volume of an image of the unit cube: densities are so much higher in the data's own units."""
        return float(torch.linalg.slogdet(self.matrix)[1])

    def enter(self, x: Tensor) -> Tensor:
        """Map points (n, d)."""
        return (x - self.centre) @ self.matrix

    def leave(self, x: Tensor) -> Tensor:
        """Map points (n, d) back."""
        return x @ self.inverse + self.centre

    def enter_covariance(self, covariance: Tensor) -> Tensor:
        """Map covariance matrices (..., d, d)."""
        return self.matrix.T @ covariance @ self.matrix

    def leave_covariance(self, covariance: Tensor) -> Tensor:
        """Map covariance matrices (..., d, d) back."""
        return self.inverse.T @ covariance @ self.inverse


def definite(covariance: Tensor) -> Tensor:
    """Return a covariance (d, d) with some variance in every direction: data may lie in a plane, a prior may not.

    What is little is told in the units of each dimension.
    """
    variance = covariance.diagonal()
    unit = torch.where(variance > 0, variance, variance.max() if bool(variance.any()) else 1.0).sqrt()
    values, vectors = torch.linalg.eigh(covariance / unit / unit[:, None])
    if float(values[0]) >= _LEAST_SHARE:
        return covariance
    raised: Tensor = (vectors * values.clamp_min(_LEAST_SHARE)) @ vectors.T * unit * unit[:, None]
    return raised
