import numpy as np
import pytest

from services.arrays import Array
from services.gateway.monitoring import monitor_state
from services.gateway.monitoring.monitor_state import rank_factors, rate_factors

UNCHANGED = np.array([0.02, 0.1])


def accumulated(evidence: Array, factors: Array) -> Array:
    return monitor_state.accumulate_evidence(evidence, factors, np.ones(len(factors), bool))


def hits(rates: list[float], count: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).random((count, len(rates))) < rates).astype(float)


@pytest.mark.parametrize("rates", [[0.02, 0.1], [0.01, 0.05], [0.0, 0.0]])
def test_rates_up_to_the_bound_are_no_evidence(rates: list[float]) -> None:
    """In calm no e-value has an expectation above 1."""
    certain = [np.full((1, 2), answer) for answer in (0.0, 1.0)]
    miss, hit = (rate_factors(one, UNCHANGED)[0] for one in certain)  # (k, alternatives)
    share = np.array(rates)[:, None]
    assert (share * hit + (1 - share) * miss <= 1 + 1e-12).all()


def test_a_larger_rate_is_found() -> None:
    """Evidence of a rate ten times the bound passes any threshold soon; of the other, which is calm, it does not."""
    path = accumulated(np.zeros((2, 5)), rate_factors(hits([0.2, 0.1], 400), UNCHANGED)).mean(axis=2)
    assert path[-1, 0] > 1e12
    assert path[:, 1].max() < 1e5


def test_the_run_length_is_kept() -> None:
    """The mean time to reach a threshold in calm, at the very bound, is at least the threshold."""
    threshold, longest = 50.0, 1000
    times = []
    for seed in range(200):
        path = accumulated(np.zeros((2, 5)), rate_factors(hits([0.02, 0.1], longest, seed), UNCHANGED)).mean(
            axis=(1, 2)
        )
        reached = np.flatnonzero(path >= threshold)
        times.append(int(reached[0]) + 1 if len(reached) else longest)
    assert np.mean(times) >= threshold


def test_evidence_goes_on_where_it_was() -> None:
    """Batches fold as one."""
    factors = rate_factors(hits([0.05, 0.2], 100), UNCHANGED)
    whole = accumulated(np.zeros((2, 5)), factors)
    first = accumulated(np.zeros((2, 5)), factors[:37])
    np.testing.assert_allclose(accumulated(first[-1], factors[37:]), whole[37:])


@pytest.mark.parametrize("mean", [0.5, 0.48, 0.52])
def test_ranks_without_change_are_no_evidence(mean: float) -> None:
    """Up to what the choice of a thousand references makes of the mean rank, no e-value is above 1 in expectation."""
    ranks = np.full(1, mean)
    assert (rank_factors(ranks, 1000) <= 1 + 1e-12).all()


def test_lower_ranks_are_found() -> None:
    ranks = np.random.default_rng(0).beta(1, 3, 400)
    assert accumulated(np.zeros((1, 6)), rank_factors(ranks, 1000))[-1].mean() > 1e6


def test_what_nothing_is_told_of_changes_nothing() -> None:
    """Evidence stays as it was, also where it would have grown."""
    factors = rate_factors(np.ones((10, 2)), UNCHANGED)
    path = monitor_state.accumulate_evidence(np.ones((2, 5)), factors, np.arange(10) < 3)
    np.testing.assert_array_equal(path[3:], np.broadcast_to(path[2], (7, 2, 5)))
