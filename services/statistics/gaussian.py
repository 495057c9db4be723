"""The Gaussian of a region in latent space."""

from dataclasses import dataclass

import numpy as np

from services.arrays import Array


def center_by_label(x: Array, label: Array) -> Array:
    """Return x (n, d) minus the mean of the rows with the same label."""
    x = x.astype(np.float64)
    _, label = np.unique(label, return_inverse=True)
    means = np.zeros((label.max() + 1, x.shape[1]))
    np.add.at(means, label, x)
    return np.asarray(x - (means / np.bincount(label)[:, None])[label])


def shrunk_covariance(scatter: Array, count: int, prior: Array) -> Array:
    """Return a covariance (d, d) that is shrunk towards a prior one.

    The prior (d, d) counts as d points. `scatter` (d, d) is the sum of squares of `count` points around their mean. The
    result is the inverse of the expected precision under the Wishart prior that the distiller's mixture has for its
    components.
    """
    dim = len(prior)
    return np.asarray((dim * prior + scatter) / (dim + count))


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A Gaussian with a mean (d,) and a definite covariance (d, d)."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, latents: Array, prior_covariance: Array) -> "Gaussian":
        """Return the Gaussian of latents (n, d), with a shrunk covariance.

        It is shrunk towards the covariance `prior_covariance` (d, d), which counts as d latents. The result has the
        expected precision under the mixture's Wishart prior.
        """
        mean = latents.mean(axis=0, dtype=np.float64)
        scatter = (latents - mean).T @ (latents - mean)
        return cls(mean=mean, covariance=shrunk_covariance(scatter, len(latents), prior_covariance))

    def distance_squared(self, latents: Array) -> Array:
        """Return the squared Mahalanobis distances (n,) of latents (n, d)."""
        root = np.linalg.cholesky(self.covariance)
        whitened = np.linalg.solve(root, (latents - self.mean).T)  # (d, n)
        return np.asarray((whitened**2).sum(axis=0))

    def sample(self, count: int, generator: np.random.Generator) -> Array:
        """Draw latents (count, d) from the Gaussian."""
        z = generator.multivariate_normal(self.mean, self.covariance, size=count, method="cholesky")
        return np.asarray(z, np.float32)

    def shift_sd(self, other: "Gaussian") -> float:
        """Return the Mahalanobis distance of means, by the average covariance."""
        both = Gaussian(mean=self.mean, covariance=(self.covariance + other.covariance) / 2)
        return float(np.sqrt(both.distance_squared(other.mean[None])[0]))

    def overlap(self, other: "Gaussian") -> float:
        """Return the Bhattacharyya coefficient in [0, 1], 1 for equal Gaussians."""
        middle = (self.covariance + other.covariance) / 2
        log_determinants = [
            np.linalg.slogdet(covariance)[1] for covariance in (middle, self.covariance, other.covariance)
        ]
        distance = Gaussian(mean=self.mean, covariance=middle).distance_squared(other.mean[None])[0] / 8
        distance += (log_determinants[0] - (log_determinants[1] + log_determinants[2]) / 2) / 2
        return float(np.exp(-distance))
