"""What a correction is trained on: images drawn from annotated regions, beside the original data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Standard deviation of the step away from a known failure, in standard deviations of the region's failures: small
# enough to stay among them, large enough to be a new image.
JITTER_SD = 0.1


@dataclass(frozen=True, kw_only=True)
class RegionData:
    """The failures of one labelled region that correction may use."""

    # (m, d)
    latent: Array
    # Class id that the annotator gave.
    label: int


@dataclass(frozen=True, kw_only=True)
class RegionImages:
    """Images to train with, from all regions."""

    # (n, c, h, w) float32 in [0, 1]
    images: Array
    # (n,) class ids
    labels: Array


def sample_region(latent: Array, count: int, generator: np.random.Generator) -> Array:
    """Draw latents (count, d) from a region's failures (m, d): each of them once, then small steps away from them."""
    order = generator.permutation(len(latent))[:count]
    extra = generator.integers(len(latent), size=count - len(order))
    step = JITTER_SD * latent.std(axis=0) * generator.standard_normal((len(extra), latent.shape[1]))
    return np.concatenate([latent[order], latent[extra] + step]).astype(np.float32)  # (count, d)


def region_images(
    regions: Sequence[RegionData], *, per_region: int, decode: Callable[[Array], Array], seed: int
) -> RegionImages:
    """Return as many images of each region, so that a small region counts as much as a large one."""
    generator = np.random.default_rng(seed)
    images = [decode(sample_region(region.latent, per_region, generator)) for region in regions]
    labels = [np.full(per_region, region.label, np.int64) for region in regions]
    return RegionImages(images=np.concatenate(images), labels=np.concatenate(labels))
