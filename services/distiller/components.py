"""The components of one confusion: its failures' latents under a Dirichlet-process mixture."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning

from services.distiller.mixture import DirichletProcessMixture

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A fitted mixture of K components in d dimensions; components that nothing belongs to are gone."""

    weights: Array  # (K,), sums to 1 but for what the dropped components held
    means: Array  # (K, d)
    covariances: Array  # (K, d, d)
    members: Array  # (n,) component of each latent it was fitted on

    def assign(self, latents: Array) -> Array:
        """Return the component of the largest posterior for latents (m, d): (m,)."""
        scores = [
            np.log(weight) + _log_density(latents, mean, covariance)
            for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return np.asarray(np.stack(scores, axis=1).argmax(axis=1))  # (m,)


def fit_mixture(latents: Array, *, max_components: int, seed: int) -> Mixture:
    """Fit latents (n, d); the number of components is found, up to `max_components`, the truncation."""
    model = DirichletProcessMixture(n_components=min(max_components, len(latents)), random_state=seed % 2**63)
    with warnings.catch_warnings():
        # A fit that stops at max_iter is a fit all the same: the bound has risen at every iteration.
        warnings.simplefilter("ignore", ConvergenceWarning)
        members = model.fit_predict(latents)
    used, members = np.unique(members, return_inverse=True)
    return Mixture(
        weights=model.weights_[used], means=model.means_[used], covariances=model.covariances_[used], members=members
    )


def mahalanobis_squared(latents: Array, mean: Array, covariance: Array) -> Array:
    """Return the squared distance of latents (m, d) from a mean in units of a covariance: (m,)."""
    root = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(root, (latents - mean).T)  # (d, m)
    return np.asarray((whitened**2).sum(axis=0))


def _log_density(latents: Array, mean: Array, covariance: Array) -> Array:
    _, log_determinant = np.linalg.slogdet(covariance)
    constant = log_determinant + len(mean) * np.log(2 * np.pi)
    return np.asarray(-0.5 * (mahalanobis_squared(latents, mean, covariance) + constant))
