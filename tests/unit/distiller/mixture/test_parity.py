"""From the same responsibilities, iteration by iteration, what scikit-learn's BayesianGaussianMixture gives."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture

from services.distiller.mixture import DirichletProcessMixture
from tests.unit.distiller.mixture.clouds import planted, responsibilities

Array = npt.NDArray[Any]
COMPONENTS, ITERATIONS = 9, 12
# Dimensions of very different units, far from the origin.
SCALE, SHIFT = np.array([1.0, 1e3, 1e-3, 1.0]), np.array([5.0, -1e3, 1e-2, 0.0])
WEIGHTS = ("dirichlet_process", "dirichlet_distribution")
KINDS = ("full", "tied", "diag", "spherical")
PRIORS: dict[str, Any] = {
    "weight_concentration_prior": 3.0,
    "mean_precision_prior": 0.2,
    "degrees_of_freedom_prior": 7.5,
    "reg_covar": 1e-9,
}


@pytest.fixture(scope="module")
def x() -> Array:
    return planted(clouds=5, dim=4, points=700, apart=2.0, scale=SCALE)[0] + SHIFT


def reference(x: Array, kind: str, weights: str, iterations: int, **priors: Any) -> BayesianGaussianMixture:
    """Return scikit-learn's mixture after iterations from given responsibilities, which it offers no way to give."""
    model = BayesianGaussianMixture(
        n_components=COMPONENTS, covariance_type=kind, weight_concentration_prior_type=weights, **priors
    )
    model._check_parameters(x, xp=np)
    model._initialize(x, responsibilities(len(x), COMPONENTS))
    for _ in range(iterations):
        log_norm, log_resp = model._e_step(x)
        model._m_step(x, log_resp)
        model.lower_bound_ = float(np.squeeze(model._compute_lower_bound(log_resp, log_norm)))
    model._set_parameters(model._get_parameters())
    return model


def ours(x: Array, kind: Any, weights: Any, iterations: int, **settings: Any) -> DirichletProcessMixture:
    model = DirichletProcessMixture(
        n_components=COMPONENTS,
        covariance_type=kind,
        weight_concentration_prior_type=weights,
        max_iter=iterations,
        tol=0,
        moves=False,
        **({"blocks": 1, "chunk_size": 128} | settings),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, responsibilities=responsibilities(len(x), COMPONENTS))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("priors", [{}, PRIORS], ids=["defaults", "priors"])
def test_every_iteration_is_that_of_scikit_learn(x: Array, kind: str, weights: str, priors: dict[str, Any]) -> None:
    """Lower bound, weights, means and covariances agree to 1e-6 after every iteration."""
    for iteration in range(1, ITERATIONS):
        theirs = reference(x, kind, weights, iteration, **priors)
        mine = ours(x, kind, weights, iteration, **priors)
        assert mine.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-6)
        np.testing.assert_allclose(mine.weights_, theirs.weights_, rtol=1e-6)
        np.testing.assert_allclose(mine.means_ / x.std(axis=0), theirs.means_ / x.std(axis=0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(mine.covariances_, theirs.covariances_, rtol=1e-6, atol=1e-6 * least(theirs))
        np.testing.assert_allclose(mine.mean_precision_, theirs.mean_precision_, rtol=1e-6)
        np.testing.assert_allclose(mine.degrees_of_freedom_, theirs.degrees_of_freedom_, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_read_as_scikit_learn_reads_them(x: Array, kind: str) -> None:
    """Log densities, responsibilities and labels of unseen points agree."""
    unseen = planted(clouds=5, dim=4, points=300, apart=2.0, scale=SCALE, seed=4)[0] + SHIFT
    theirs, mine = reference(x, kind, WEIGHTS[0], 8), ours(x, kind, WEIGHTS[0], 8)
    np.testing.assert_allclose(mine.score_samples(unseen), theirs.score_samples(unseen), rtol=1e-6)
    np.testing.assert_allclose(mine.predict_proba(unseen), theirs.predict_proba(unseen), atol=1e-7)
    np.testing.assert_array_equal(mine.predict(unseen), theirs.predict(unseen))


@pytest.mark.parametrize(("threads", "chunk_size"), [(1, 64), (2, 701), (5, 100)])
def test_threads_and_chunks_change_rounding_alone(x: Array, threads: int, chunk_size: int) -> None:
    """How the work is cut makes no difference."""
    whole = ours(x, "full", WEIGHTS[0], 8, threads=1)
    cut = ours(x, "full", WEIGHTS[0], 8, threads=threads, chunk_size=chunk_size)
    assert cut.lower_bound_ == pytest.approx(whole.lower_bound_, rel=1e-12)
    np.testing.assert_allclose(cut.means_ / SCALE, whole.means_ / SCALE, rtol=1e-9)


def least(model: BayesianGaussianMixture) -> float:
    """Return the least variance, beside which an entry of a covariance is next to nothing."""
    return float(np.abs(model.covariances_).min())
