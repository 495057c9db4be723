from typing import Any

import numpy as np
import numpy.typing as npt

from services.corrector.correction_data import RegionData, fresh_latents, region_latents, sample_region

Array = npt.NDArray[Any]


def planted(count: int = 30, centre: float = 0.0, label: int = 1, seed: int = 0) -> RegionData:
    """Plant failures around a centre, narrow in the first dimension and wide in the second."""
    spread = np.random.default_rng(seed).standard_normal((count, 3)) * [1, 10, 1]
    latent = np.asarray(spread + centre, np.float32)
    return RegionData(latent=latent, mean=np.full(3, centre), covariance=np.diag([1.0, 100.0, 1.0]), label=label)


def everything(z: Array) -> Array:
    return np.ones(len(z), bool)


def one_hot_of_sign(z: Array) -> Array:
    """Believe that latents of a positive first dimension are of class 1, others of class 0."""
    return np.stack([z[:, 0] <= 0, z[:, 0] > 0], axis=1).astype(np.float64)


def test_images_are_fresh_draws_from_the_gaussian() -> None:
    """Draws have the region's mean and covariance, and are no known failure."""
    region = planted(centre=5)
    drawn = sample_region(region, 20_000, everything, np.random.default_rng(1))
    np.testing.assert_allclose(drawn.mean(axis=0), 5, atol=0.3)
    np.testing.assert_allclose(np.cov(drawn.T), np.diag([1, 100, 1]), atol=3)
    assert not {tuple(row) for row in drawn} & {tuple(row) for row in region.latent}


def test_draws_still_carry_the_label() -> None:
    """Latents that do not carry the label are drawn again."""
    drawn = sample_region(planted(), 1000, lambda z: z[:, 0] > 0, np.random.default_rng(0))
    assert len(drawn) == 1000
    assert (drawn[:, 0] > 0).all()


def test_draws_of_a_wider_gaussian() -> None:
    """Four times the covariance is twice as wide; draws without the label are left out, not replaced."""
    region = planted()
    narrow, wide = (fresh_latents(region, 5000, everything, np.random.default_rng(0), spread=s) for s in (1.0, 4.0))
    np.testing.assert_allclose(wide.std(axis=0), 2 * narrow.std(axis=0), rtol=1e-3)
    assert len(fresh_latents(region, 50, lambda z: np.zeros(len(z), bool), np.random.default_rng(0))) == 0


def test_where_hardly_any_draw_carries_the_label_failures_fill_up() -> None:
    """A region is never short of images, and never filled with what is not its label: its failures come in turn."""
    region = planted()
    drawn = sample_region(region, 60, lambda z: np.zeros(len(z), bool), np.random.default_rng(0))
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, np.unique(region.latent, axis=0))
    assert set(counts) == {2}
    few = sample_region(region, 10, lambda z: np.zeros(len(z), bool), np.random.default_rng(0))
    assert len(np.unique(few, axis=0)) == 10


def test_a_single_failure_is_repeated() -> None:
    """Nothing is made up around a failure that was labelled by itself."""
    single = RegionData.single(np.array([1, 2, 3], np.float32), 0)
    drawn = sample_region(single, 5, everything, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, [[1, 2, 3]] * 5)


def test_regions_count_the_same_whatever_their_size() -> None:
    """Each region gives as many latents, with the annotator's label, and they carry it."""
    regions = [planted(5, -3, label=0), planted(80, 3, label=1)]
    latent, labels = region_latents(
        regions, per_region=200, label_probabilities=one_hot_of_sign, min_label_probability=0.9, seed=0
    )
    np.testing.assert_array_equal(labels, [0] * 200 + [1] * 200)
    assert latent.shape == (400, 3)
    assert (latent[:200, 0] <= 0).all()
    assert (latent[200:, 0] > 0).all()


def test_same_seed_same_latents() -> None:
    """They are the regions and the seed."""
    first, second, other = (
        region_latents(
            [planted()], per_region=64, label_probabilities=one_hot_of_sign, min_label_probability=0.9, seed=seed
        )[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
