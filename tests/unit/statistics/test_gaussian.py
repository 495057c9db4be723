import numpy as np
import pytest

from services.statistics.gaussian import Gaussian

GAUSSIAN = Gaussian(mean=np.array([1.0, -2.0]), covariance=np.array([[1.0, 0.6], [0.6, 0.5]]))


def shifted(step: float) -> Gaussian:
    """The same Gaussian, moved along the first axis by `step`."""
    return Gaussian(mean=GAUSSIAN.mean + np.array([step, 0]), covariance=GAUSSIAN.covariance)


def test_draws_have_its_mean_and_covariance() -> None:
    """Draws are the Gaussian, and the same for the same generator."""
    z = GAUSSIAN.sample(20_000, np.random.default_rng(1))
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(axis=0), GAUSSIAN.mean, atol=0.03)
    np.testing.assert_allclose(np.cov(z.T), GAUSSIAN.covariance, atol=0.03)
    np.testing.assert_array_equal(z[:5], GAUSSIAN.sample(20_000, np.random.default_rng(1))[:5])


def test_distances_are_in_units_of_the_covariance() -> None:
    """One standard deviation along any direction is a distance of one."""
    root = np.linalg.cholesky(GAUSSIAN.covariance)
    np.testing.assert_allclose(GAUSSIAN.distance_squared(GAUSSIAN.mean + root.T), [1, 1])


def test_shift_is_in_units_of_the_covariance() -> None:
    """The shift of equal Gaussians is the Mahalanobis distance of their means."""
    variance = 1 / np.linalg.inv(GAUSSIAN.covariance)[0, 0]
    assert GAUSSIAN.shift_sd(shifted(3 * np.sqrt(variance))) == pytest.approx(3)
    assert GAUSSIAN.shift_sd(GAUSSIAN) == 0


def test_overlap_is_the_integral_of_the_geometric_mean() -> None:
    """The Bhattacharyya coefficient, against a sum over a grid; 1 for the same, less the farther away."""
    other = Gaussian(mean=np.array([1.5, -1.0]), covariance=np.array([[0.5, 0.0], [0.0, 1.0]]))
    axis = np.linspace(-9, 9, 601)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)

    def density(of: Gaussian) -> np.ndarray:
        normal = 2 * np.pi * np.sqrt(np.linalg.det(of.covariance))
        return np.exp(-0.5 * of.distance_squared(grid)) / normal

    integral = np.sqrt(density(GAUSSIAN) * density(other)).sum() * (axis[1] - axis[0]) ** 2
    assert GAUSSIAN.overlap(other) == pytest.approx(integral, rel=1e-3)
    assert GAUSSIAN.overlap(GAUSSIAN) == pytest.approx(1)
    assert 1 > GAUSSIAN.overlap(shifted(0.1)) > GAUSSIAN.overlap(shifted(1.0)) > 0
