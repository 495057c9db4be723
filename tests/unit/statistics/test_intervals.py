import pytest
from defuse.v1 import tensor_pb2
from scipy.stats import binom

from services.statistics.hypothesis_tests import clopper_pearson
from services.storage.catalog import estimate


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Closed forms at the ends: 1 - (alpha / 2)^(1 / n).
        (0, 10, 0.0, 0.30850),
        (10, 10, 0.69150, 1.0),
        (0, 1, 0.0, 0.975),
        (5, 10, 0.18709, 0.81291),
        (1, 20, 0.00127, 0.24873),
        (90, 100, 0.82378, 0.95100),
    ],
)
def test_known_values(successes: int, trials: int, low: float, high: float) -> None:
    """The interval is Clopper and Pearson's, at 95 %."""
    assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("successes", "trials"), [(3, 17), (1, 2), (199, 200)])
def test_the_ends_are_where_the_tails_hold_two_and_a_half_percent(successes: int, trials: int) -> None:
    """At the lower end as many successes or more, at the upper end as many or fewer, have probability 0.025."""
    low, high = clopper_pearson(successes, trials)
    assert binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    assert binom.cdf(successes, trials, high) == pytest.approx(0.025)


def test_confidence() -> None:
    """More confidence is a wider interval."""
    narrow, wide = clopper_pearson(5, 10, confidence=0.5), clopper_pearson(5, 10, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_without_trials_nothing_is_known() -> None:
    """No trials give the whole interval, and an estimate that says so."""
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    assert estimate(0, 0) == tensor_pb2.Estimate(value=0, low=0, high=1, successes=0, trials=0)


def test_estimate() -> None:
    """An estimate carries the share, its interval and the counts."""
    found = estimate(90, 100)
    assert (found.value, found.successes, found.trials) == (0.9, 90, 100)
    assert (found.low, found.high) == clopper_pearson(90, 100)
