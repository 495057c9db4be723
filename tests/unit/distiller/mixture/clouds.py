"""Gaussian clouds whose parameters are known."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def planted(
    *, clouds: int, dim: int, points: int, apart: float, seed: int = 0, scale: Array | None = None
) -> tuple[Array, Array]:
    """Plant clouds of unequal size and shape, centres `apart` sds from each other; return points (n, d) and labels."""
    random = np.random.default_rng(seed)
    weight = random.dirichlet(np.full(clouds, 2.0)) * 0.5 + 0.5 / clouds
    label = np.sort(random.choice(clouds, points, p=weight))
    centres = random.normal(0, apart, (clouds, dim))
    roots = random.normal(0, 0.3, (clouds, dim, dim)) + np.eye(dim)
    x = centres[label] + np.einsum("nd,nde->ne", random.standard_normal((points, dim)), roots[label])
    order = random.permutation(points)
    return np.asarray((x * (1.0 if scale is None else scale))[order]), label[order]


def responsibilities(points: int, components: int, seed: int = 1) -> Array:
    """Draw soft responsibilities (n, K)."""
    return np.random.default_rng(seed).dirichlet(np.full(components, 0.1), points)
