from math import comb

import numpy as np
import pytest

from services.statistics.hypothesis_tests import ErrorRateTest, q_values


def trial(errors: int, decodes: int, control_errors: int, controls: int) -> ErrorRateTest:
    return ErrorRateTest(errors=errors, decodes=decodes, control_errors=control_errors, controls=controls)


def test_the_p_value_is_the_hypergeometric_tail() -> None:
    """So many errors among the decodes or more, of all errors dealt out at random."""
    tail = sum(comb(5, errors) * comb(15, 10 - errors) for errors in (4, 5)) / comb(20, 10)
    assert trial(4, 10, 1, 10).p_value == pytest.approx(tail)


@pytest.mark.parametrize("alike", [trial(10, 100, 10, 100), trial(0, 100, 0, 100), trial(50, 100, 0, 0)])
def test_no_worse_than_controls(alike: ErrorRateTest) -> None:
    """Equal rates, no errors, and nothing to compare with are no evidence."""
    assert alike.p_value >= 0.5
    assert alike.excess == 0 or alike.controls == 0


def test_false_discoveries_are_bounded() -> None:
    """Of 300 groups no worse than their controls beside 30 that are, 5 % of those kept are false at most, nearly."""
    random = np.random.default_rng(0)
    rates = np.r_[np.full(300, 0.1), np.full(30, 0.4)]
    trials = [trial(int(random.binomial(100, rate)), 100, int(random.binomial(100, 0.1)), 100) for rate in rates]
    kept = q_values(trials) <= 0.05
    assert kept[300:].sum() >= 28
    assert kept[:300].sum() <= 0.1 * kept.sum()
    assert (np.array([one.p_value for one in trials]) <= 0.05)[:300].sum() > kept[:300].sum()


def test_nothing_to_test() -> None:
    """No groups, no values."""
    assert q_values([]).shape == (0,)
