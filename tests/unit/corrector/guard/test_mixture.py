import numpy as np

from services.corrector.guard.graph import GaussianMixtures


def test_gaussians_are_those_of_the_points() -> None:
    """Means, covariances and weights of many points are the planted ones."""
    generator = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.6], [0.6, 1.0]])
    parts = [generator.multivariate_normal(mean, covariance, 20_000) for mean in ([0, 0], [5, 1])]
    mixture = GaussianMixtures.of(parts, [3, 1])
    np.testing.assert_allclose(mixture.mean, [[0, 0], [5, 1]], atol=0.05)
    np.testing.assert_allclose(np.exp(mixture.log_weight), [0.75, 0.25])
    for whitening in mixture.whitening:
        np.testing.assert_allclose(np.linalg.inv(whitening.T @ whitening), covariance, atol=0.06)


def test_few_points_lean_on_what_all_have_in_common() -> None:
    """Three points in a plane have a definite covariance, between none and that of the many."""
    generator = np.random.default_rng(0)
    many = generator.standard_normal((1000, 4))
    mixture = GaussianMixtures.of([many, np.eye(3, 4)], [1, 1])
    determinants = [np.linalg.det(whitening) for whitening in mixture.whitening]
    assert np.isfinite(determinants).all()
    assert determinants[0] < determinants[1]


def test_log_scale_is_the_density_at_the_mean() -> None:
    """Weight times density of a planted Gaussian, but for the constant."""
    mixture = GaussianMixtures.of([np.random.default_rng(0).standard_normal((100_000, 2)) * [1, 3]], [1])
    np.testing.assert_allclose(mixture.log_scale, -np.log(3), atol=0.02)
