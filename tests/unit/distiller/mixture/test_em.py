"""A learned prior says what the planted components look like, and finds those that the default one loses."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import wishart
from sklearn.metrics import adjusted_rand_score

from services.distiller.mixture import DirichletProcessMixture


def clouds(*, count: int, points: int, degrees: float, seed: int) -> tuple[Any, Any]:
    """Draw clouds with precisions of a Wishart law in 3 dimensions, far apart; return points and labels."""
    random = np.random.default_rng(seed)
    precisions = wishart(degrees, np.eye(3) / degrees).rvs(count, random_state=random)
    label = np.repeat(np.arange(count), points)
    roots = np.linalg.cholesky(np.linalg.inv(precisions))
    x = 60 * random.random((count, 3))[label]
    return x + np.einsum("nde,ne->nd", roots[label], random.standard_normal((len(label), 3))), label


@pytest.mark.parametrize("degrees", [6.0, 12.0])
def test_planted_degrees_of_freedom_and_scale_are_learned(degrees: float) -> None:
    """Of 60 clouds whose precisions follow a Wishart law, its degrees of freedom and its mean come back."""
    x, _ = clouds(count=60, points=200, degrees=degrees, seed=0)
    model = DirichletProcessMixture(n_components=80, learn_prior=True).fit(x)
    assert 0.6 * degrees < model.degrees_of_freedom_prior_ < 1.6 * degrees
    typical = np.linalg.inv(model.covariance_prior_ / model.degrees_of_freedom_prior_)
    np.testing.assert_allclose(typical, np.eye(3), atol=0.25)


def test_a_learned_prior_parts_small_components() -> None:
    """In 15 dimensions the default prior, as wide as all data, gives clouds of 50 points to their neighbours."""
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(40), 50)
    x = random.normal(0, 1.5, (40, 15))[label] + random.standard_normal((len(label), 15))
    found = {
        learn: DirichletProcessMixture(n_components=60, learn_prior=learn).fit_predict(x) for learn in (True, False)
    }
    learned, default = (adjusted_rand_score(label, found[learn]) for learn in (True, False))
    assert learned > max(0.9, default + 0.05)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_every_covariance_type_learns(kind: Any) -> None:
    """Six clouds are found with any type; the prior's covariance is told as a matrix."""
    x, _ = clouds(count=6, points=300, degrees=50.0, seed=1)
    model = DirichletProcessMixture(n_components=12, covariance_type=kind, learn_prior=True)
    assert len(np.unique(model.fit_predict(x))) == 6
    assert model.covariance_prior_.shape == (3, 3)
