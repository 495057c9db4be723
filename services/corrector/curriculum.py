"""What a correction is trained on beside the original data: latents drawn from annotated regions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from services.arrays import Array

# Latents that are drawn for each image, at most, until one still carries its label.
_MOST_DRAWS = 20


@dataclass(frozen=True, kw_only=True)
class RegionData:
    """A labelled region: its failures that correction may use, and its Gaussian."""

    # (m, d)
    latent: Array
    # (d,) and (d, d)
    mean: Array
    covariance: Array
    # Class id that the annotator gave.
    label: int

    @classmethod
    def single(cls, latent: Array, label: int) -> Self:
        """Return one failure (d,), labelled by itself: there is nothing around it to draw from."""
        return cls(latent=latent[None], mean=latent, covariance=np.zeros((len(latent), len(latent))), label=label)


def carrying(believed: Callable[[Array], Array], label: int, min_label_probability: float) -> Callable[[Array], Array]:
    """Return what says of latents (n, d) whether they carry a label, (n,).

    `believed` tells labels from latents: (n, d) to probabilities (n, k).
    """
    return lambda z: np.asarray(believed(z)[:, label] >= min_label_probability)


def fresh_latents(
    region: RegionData,
    count: int,
    carried: Callable[[Array], Array],
    generator: np.random.Generator,
    *,
    spread: float = 1.0,
) -> Array:
    """Draw latents (n, d), `count` at most, from a region's Gaussian that still carry its label.

    `carried` says so of latents, (n,). `spread` is how many times as large as the region's the covariance is: fewer
    carry the label further out.
    """
    if not region.covariance.any():
        return region.latent[:0]
    drawn = generator.multivariate_normal(
        region.mean, spread * region.covariance, size=_MOST_DRAWS * count, method="cholesky"
    ).astype(np.float32)
    return np.asarray(drawn[carried(drawn)][:count])


def sample_region(
    region: RegionData, count: int, carried: Callable[[Array], Array], generator: np.random.Generator
) -> Array:
    """Draw latents (count, d) of a region, fresh ones that still carry its label, as `carried` says of latents, (n,).

    Where there are too few of these, the region's failures fill up. They do not come first: they are the images that
    the search came upon, next to the boundary and around few sources, and teach less of the region (docs/method.md).
    """
    fresh = fresh_latents(region, count, carried, generator)
    order = generator.permutation(len(region.latent))
    known = region.latent[np.resize(order, count - len(fresh))]
    return np.concatenate([fresh, known]).astype(np.float32)  # (count, d)


def region_latents(
    regions: Sequence[RegionData],
    *,
    per_region: int,
    believed: Callable[[Array], Array],
    min_label_probability: float,
    seed: int,
) -> tuple[Array, Array]:
    """Return latents (n, d) and labels (n,): as many of each region, so that a small one counts as much as a large one.

    What no longer carries the region's label with `min_label_probability`, as `believed` has it, is drawn again. There
    is at least one region.
    """
    generator = np.random.default_rng(seed)

    def drawn(region: RegionData) -> Array:
        carried = carrying(believed, region.label, min_label_probability)
        return sample_region(region, per_region, carried, generator)

    labels = np.repeat([region.label for region in regions], per_region).astype(np.int64)
    return np.concatenate([drawn(region) for region in regions]), labels
