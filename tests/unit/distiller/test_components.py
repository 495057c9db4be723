from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.distiller.components import Mixture, fit_mixture, mahalanobis_squared

Array = npt.NDArray[Any]
CENTRES = np.array([[-4.0, 0.0], [4.0, 0.0], [0.0, 6.0]])
SIZES = (200, 120, 80)


def planted(seed: int = 0) -> tuple[Array, Array]:
    """Plant three round clouds of unequal size; return latents (400, 2) and their cloud (400,)."""
    cloud = np.repeat(np.arange(3), SIZES)
    return CENTRES[cloud] + 0.5 * np.random.default_rng(seed).standard_normal((len(cloud), 2)), cloud


def fit(seed: int = 0, max_components: int = 10) -> Mixture:
    return fit_mixture(planted()[0], max_components=max_components, seed=seed)


def cloud_of(mixture: Mixture) -> Array:
    """Return the nearest planted centre of each component."""
    distance = np.linalg.norm(mixture.means[:, None] - CENTRES[None], axis=2)  # (K, 3)
    return np.asarray(distance.argmin(axis=1))


def test_planted_clouds_are_found_one_to_one() -> None:
    """The number of components is found, and each is a cloud with its weight, mean, covariance and members.

    A weight may lack a little: what the stick keeps back for components that nothing belongs to.
    """
    mixture = fit()
    assert sorted(cloud_of(mixture)) == [0, 1, 2]
    clouds = cloud_of(mixture)
    np.testing.assert_allclose(mixture.weights, np.array(SIZES)[clouds] / 400, atol=0.03)
    assert 0.95 < mixture.weights.sum() <= 1
    np.testing.assert_allclose(mixture.means, CENTRES[clouds], atol=0.2)
    np.testing.assert_allclose(mixture.covariances, np.tile(0.25 * np.eye(2), (3, 1, 1)), atol=0.4)
    np.testing.assert_array_equal(clouds[mixture.members], planted()[1])


def test_unseen_latents_are_assigned_to_their_cloud() -> None:
    """Latents that were not fitted get the component of the largest posterior; none at all get none."""
    mixture = fit()
    unseen, cloud = planted(seed=9)
    np.testing.assert_array_equal(cloud_of(mixture)[mixture.assign(unseen)], cloud)
    assert mixture.assign(np.zeros((0, 2))).shape == (0,)


def test_assignment_weighs_shape_and_weight() -> None:
    """Half way between two means the wider component wins; between equal shapes the heavier one does."""
    middle = np.zeros((1, 2))
    means = np.array([[-1.0, 0.0], [1.0, 0.0]])
    narrow_and_wide = np.array([0.05 * np.eye(2), np.eye(2)])
    equal = np.tile(np.eye(2), (2, 1, 1))
    members = np.zeros(0, int)
    wider = Mixture(weights=np.array([0.5, 0.5]), means=means, covariances=narrow_and_wide, members=members)
    heavier = Mixture(weights=np.array([0.7, 0.3]), means=means, covariances=equal, members=members)
    assert wider.assign(middle) == [1]
    assert heavier.assign(middle) == [0]


def test_same_seed_same_mixture() -> None:
    """A fit is its data and its seed, also for a seed that scikit-learn would refuse."""
    for seed in (3, 2**63 + 11):
        first, second = fit(seed), fit(seed)
        np.testing.assert_array_equal(first.means, second.means)
        np.testing.assert_array_equal(first.members, second.members)


@pytest.mark.parametrize("count", [2, 5])
def test_fewer_latents_than_components(count: int) -> None:
    """The truncation never exceeds the number of latents."""
    mixture = fit_mixture(planted()[0][:count], max_components=10, seed=0)
    assert len(mixture.members) == count
    assert len(mixture.weights) <= count


def test_truncation_bounds_the_components() -> None:
    """There are never more components than asked for."""
    assert len(fit(max_components=2).weights) == 2


def test_mahalanobis_distance() -> None:
    """The distance is in units of the covariance: (x - m)' C^-1 (x - m)."""
    covariance = np.array([[2.0, 0.6], [0.6, 1.0]])
    latents, mean = np.random.default_rng(0).standard_normal((7, 2)), np.array([0.3, -1.0])
    step = latents - mean
    expected = (step @ np.linalg.inv(covariance) * step).sum(axis=1)
    np.testing.assert_allclose(mahalanobis_squared(latents, mean, covariance), expected)


@pytest.fixture(scope="module")
def in_many_dimensions() -> tuple[Mixture, Array]:
    """Plant two round clouds of 300 in 16 dimensions, ten of their deviations apart, and room for two components."""
    cloud = np.repeat([0, 1], 300)
    latents = 0.4 * np.random.default_rng(0).standard_normal((600, 16))
    latents[:, 0] += 4 * cloud
    return fit_mixture(latents, max_components=2, seed=0), cloud


def test_clouds_in_many_dimensions_are_found_one_to_one(in_many_dimensions: tuple[Mixture, Array]) -> None:
    """Clouds are found in as many dimensions as a VAE has; larger truncations are not emptied (docs/method.md)."""
    mixture, cloud = in_many_dimensions
    assert len(mixture.weights) == 2
    assert len(np.unique(np.stack([mixture.members, cloud]), axis=1).T) == 2


def test_covariance_is_that_of_the_component(in_many_dimensions: tuple[Mixture, Array]) -> None:
    """How far apart the clouds lie does not widen any of them: fresh draws from a component stay in it."""
    mixture, _ = in_many_dimensions
    assert (mixture.covariances[:, 0, 0] < 2 * 0.4**2).all()
