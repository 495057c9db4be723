"""Mixtures of Gaussians that are told apart: the regions' latents against those of real images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from services.arrays import Array

# Least variance of a component, in squared aggregate sds: latents that lie in a plane would have none.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Gaussians over points x (n, d): k weights, means and inverses of the lower Cholesky factors of covariances."""

    log_weight: Array  # (k,)
    mean: Array  # (k, d)
    whitening: Array  # (k, d, d)

    @classmethod
    def of(cls, parts: Sequence[Array], weights: Sequence[float]) -> Self:
        """Fit one Gaussian to each of k sets of points (n, d), none of which is empty.

        Small sets lean on the covariance that all have in common, which counts as much as d points: the mean of the
        posterior under the Wishart prior that the distiller's mixture has.
        """
        pooled = _pooled(parts)
        covariances = [_covariance(x, pooled) for x in parts]
        return cls(
            log_weight=np.log(np.asarray(weights) / np.sum(weights)),
            mean=np.stack([x.mean(axis=0, dtype=np.float64) for x in parts]),
            whitening=np.stack([np.linalg.inv(np.linalg.cholesky(covariance)) for covariance in covariances]),
        )

    @property
    def log_scale(self) -> Array:
        """The log of weight times density at the mean, but for `(2 pi)^(-d/2)`, (k,)."""
        return np.asarray(self.log_weight + np.log(np.diagonal(self.whitening, axis1=1, axis2=2)).sum(axis=1))


def _pooled(parts: Sequence[Array]) -> Array:
    """Return the covariance (d, d) within sets of points."""
    centred = np.concatenate([x - x.mean(axis=0, dtype=np.float64) for x in parts])
    return np.asarray(centred.T @ centred / len(centred)) + _LEAST_VARIANCE * np.eye(centred.shape[1])


def _covariance(x: Array, believed: Array) -> Array:
    count, dim = x.shape
    centred = x - x.mean(axis=0, dtype=np.float64)
    return np.asarray((dim * believed + centred.T @ centred) / (dim + count))
