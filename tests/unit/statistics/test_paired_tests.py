import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from services.statistics.hypothesis_tests import AccuracyDifference

CHANGES = [(12, 2, 50), (30, 40, 1000), (0, 3, 1000), (5, 9, 44), (1, 0, 10), (200, 20, 10_000)]


def constrained_score(gained: int, lost: int, trials: int, delta: float) -> float:
    """Tango's score from its definition: the standard error at the most likely shares whose difference is delta."""

    def log_likelihood(only_before: float) -> float:
        shares = (only_before + delta, only_before, 1 - 2 * only_before - delta)
        counts = (gained, lost, trials - gained - lost)
        return sum(count * np.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    found = minimize_scalar(
        lambda share: -log_likelihood(share), bounds=bounds, method="bounded", options={"xatol": 1e-12}
    )
    return float((gained - lost - trials * delta) / np.sqrt(trials * (2 * found.x + delta - delta**2)))


@pytest.mark.parametrize(("gained", "lost", "trials"), CHANGES)
def test_the_interval_is_where_the_score_is_a_quantile(gained: int, lost: int, trials: int) -> None:
    """Both ends are those that the definition gives, with shares maximised by a search."""
    quantile, value = float(norm.ppf(0.975)), (gained - lost) / trials
    expected = [
        brentq(lambda delta: constrained_score(gained, lost, trials, delta) - quantile, -0.999, value),
        brentq(lambda delta: constrained_score(gained, lost, trials, delta) + quantile, value, 0.999),
    ]
    np.testing.assert_allclose(
        AccuracyDifference(gained=gained, lost=lost, trials=trials).interval(), expected, atol=1e-6
    )


def test_the_interval_covers() -> None:
    """Of simulated comparisons with few changes, about 95 in 100 intervals hold the true difference."""
    random = np.random.default_rng(0)
    counts = random.multinomial(400, [0.02, 0.01, 0.97], size=1000)
    intervals = [AccuracyDifference(gained=up, lost=down, trials=400).interval() for up, down, _ in counts.tolist()]
    covered = sum(low <= 0.01 <= high for low, high in intervals)
    assert 930 <= covered <= 975


def test_no_change_is_no_certainty() -> None:
    """Where nothing changed the interval has a width, which shrinks with the number of images."""
    few, many = (AccuracyDifference(gained=0, lost=0, trials=trials).interval() for trials in (30, 10_000))
    assert few[0] == pytest.approx(-few[1])
    assert 0.1 < few[1] < 0.12
    assert many[1] < 0.0005


def test_the_ends_of_the_scale() -> None:
    """All gained, all lost and nothing measured have intervals, too."""
    assert AccuracyDifference(gained=5, lost=0, trials=5).interval()[1] == 1
    assert AccuracyDifference(gained=0, lost=5, trials=5).interval()[0] == -1
    assert AccuracyDifference(gained=0, lost=0, trials=0).interval() == (-1, 1)
    assert AccuracyDifference(gained=0, lost=0, trials=0).value == 0


@pytest.mark.parametrize(("gained", "lost", "p_value"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (9, 1, 0.021484375)])
def test_mcnemar(gained: int, lost: int, p_value: float) -> None:
    """The exact two-sided test on images that changed: twice a binomial tail, at most 1."""
    assert AccuracyDifference(gained=gained, lost=lost, trials=100).p_value() == pytest.approx(p_value)
