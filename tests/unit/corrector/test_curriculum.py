from typing import Any

import numpy as np
import numpy.typing as npt

from services.corrector.curriculum import JITTER_SD, RegionData, region_images, sample_region

Array = npt.NDArray[Any]


def planted(count: int = 30, centre: float = 0.0, seed: int = 0) -> Array:
    """Plant failures with deviations 1, 10 and 0 around a centre."""
    spread = np.random.default_rng(seed).standard_normal((count, 3)) * [1, 10, 0]
    return np.asarray(spread + centre, np.float32)


def as_images(z: Array) -> Array:
    return z.reshape(len(z), 1, 1, 3)


def test_every_failure_is_drawn_once_before_any_new_one() -> None:
    """The known failures come first, each once and unchanged."""
    latent = planted()
    drawn = sample_region(latent, 100, np.random.default_rng(0))
    assert drawn.shape == (100, 3)
    np.testing.assert_array_equal(np.unique(drawn[:30], axis=0), np.unique(latent, axis=0))


def test_what_is_beyond_them_are_small_steps() -> None:
    """Further draws are new: a normal step of a tenth of the region's deviation in each dimension, from any failure."""
    latent = np.array([[-10, 100, 3], [10, -100, 3]], np.float32)
    drawn = sample_region(latent, 4002, np.random.default_rng(0))[2:]
    first = drawn[:, 0] < 0
    assert 0.45 < first.mean() < 0.55
    step = drawn - latent[np.where(first, 0, 1)]
    np.testing.assert_allclose(step.std(axis=0), JITTER_SD * np.array([10, 100, 0]), rtol=0.05)
    np.testing.assert_allclose(step.mean(axis=0), 0, atol=0.5)


def test_fewer_draws_than_failures() -> None:
    """A part of a large region is drawn without repetition."""
    latent = planted(count=500)
    drawn = sample_region(latent, 100, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == 100
    assert {tuple(row) for row in drawn} <= {tuple(row) for row in latent}


def test_regions_count_the_same_whatever_their_size() -> None:
    """Each region gives as many images, decoded, with the annotator's label."""
    regions = [RegionData(latent=planted(5, -100), label=2), RegionData(latent=planted(80, 100), label=0)]
    data = region_images(regions, per_region=20, decode=as_images, seed=0)
    np.testing.assert_array_equal(data.labels, [2] * 20 + [0] * 20)
    assert data.images.shape == (40, 1, 1, 3)
    np.testing.assert_array_equal(data.images[..., 2].ravel() > 0, data.labels == 0)


def test_same_seed_same_images() -> None:
    """The images are the regions and the seed."""
    regions = [RegionData(latent=planted(), label=1)]
    first, second, other = (
        region_images(regions, per_region=64, decode=as_images, seed=seed).images for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
