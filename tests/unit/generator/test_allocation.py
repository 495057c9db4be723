from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.generator.allocation import DirectionSums, SourceStatistics, allocate, failure_rates, uniform_allocation
from tests.unit.generator.odds import Array, Odds

NORMAL = Odds.planted(np.random.default_rng(1).normal(2.0, 1.0, 2000))


def allocated(tally: SourceStatistics, decodes: int, limit: int = 5) -> Array:
    return allocate(tally, decodes=decodes, limit=limit, uniform_decodes=20)


def arranged(tally: SourceStatistics, order: Array) -> SourceStatistics:
    return SourceStatistics(**{field.name: getattr(tally, field.name)[order] for field in fields(SourceStatistics)})


def test_a_uniform_round_prefers_nobody() -> None:
    """Every searchable source gets the same number of decodes, the others none."""
    np.testing.assert_array_equal(uniform_allocation(np.array([True, False, True]), 7), [7, 0, 7])


@pytest.mark.parametrize(("draws", "agreement"), [(0, 0.9), (1, 0.8), (4, 0.9), (16, 0.93)])
def test_rates_rank_sources_as_the_truth_does(draws: int, agreement: float) -> None:
    """From few margins already the sources are ordered nearly as their true rates are."""
    rates = failure_rates(NORMAL.uniform(draws))
    assert stats.spearmanr(rates, NORMAL.rate).statistic > agreement


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_rates_are_right_on_average(draws: int) -> None:
    """Estimated rates add up to the failures that are to be expected."""
    rates = failure_rates(NORMAL.uniform(draws))
    assert rates.mean() == pytest.approx(NORMAL.rate.mean(), rel=0.1)


def test_more_draws_know_more() -> None:
    """The estimate comes nearer to the truth with the number of draws."""
    errors = [np.abs(failure_rates(NORMAL.uniform(draws)) - NORMAL.rate).mean() for draws in (0, 4, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]


def test_failures_count_beside_margins() -> None:
    """Of two sources with the same margins the one with more confirmed failures is thought the more fruitful."""
    tally = NORMAL.uniform(6)
    failures = tally.failures.copy()
    failures[7] += 3
    before, after = failure_rates(tally), failure_rates(replace(tally, failures=failures))
    assert after[7] > before[7] + 0.1
    np.testing.assert_allclose(np.delete(after, 7), np.delete(before, 7))


def test_rates_are_rates() -> None:
    """A rate lies in [0, 1], and is 0 for a source that is not searched."""
    odds = replace(NORMAL, searchable=np.arange(2000) % 3 > 0)
    for draws in (0, 1, 30):
        rates = failure_rates(odds.uniform(draws))
        assert (rates[~odds.searchable] == 0).all()
        assert rates.min() >= 0
        assert rates.max() <= 1


@pytest.mark.parametrize("decodes", [1, 100, 1500])
def test_all_decodes_are_given_out(decodes: int) -> None:
    """While there are sources to search, every decode is given to somebody."""
    allocation = allocated(NORMAL.uniform(1), decodes)
    assert allocation.sum() == decodes
    assert allocation.dtype == np.int32


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 30),
    decodes=st.integers(-5, 400),
    limit=st.integers(1, 6),
    draws=st.integers(0, 8),
)
def test_nobody_gets_what_he_cannot_use(seed: int, count: int, decodes: int, limit: int, draws: int) -> None:
    """Never more than `decodes` are given out, and none to sources that are not searchable or have given enough."""
    random = np.random.default_rng(seed)
    odds = Odds.planted(random.normal(1.0, 1.0, count), draws=8, seed=seed)
    odds = replace(odds, searchable=random.random(count) < 0.8)
    tally = odds.uniform(draws, limit)
    allocation = allocated(tally, decodes, limit)
    assert allocation.shape == (count,)
    assert allocation.min() >= 0
    assert allocation.sum() <= max(decodes, 0)
    closed = ~odds.searchable | (tally.failures >= limit)
    assert not allocation[closed].any()


@pytest.mark.parametrize("nothing", ["sources", "decodes", "searchable", "room"])
def test_nothing_to_give(nothing: str) -> None:
    """Without sources, decodes, or anybody to give them to, the allocation is empty; the search is over then."""
    tally = NORMAL.uniform(30, limit=1)
    cases = {
        "sources": (arranged(tally, np.zeros(0, int)), 100),
        "decodes": (tally, 0),
        "searchable": (replace(tally, searchable=np.zeros(2000, bool)), 100),
        "room": (replace(tally, failures=np.ones(2000, np.int32)), 100),
    }
    assert allocated(*cases[nothing], limit=1).sum() == 0


def test_likely_sources_are_preferred() -> None:
    """Decodes go to sources of high true rates, several to the best, and to none of those that hardly ever fail."""
    allocation = allocated(NORMAL.uniform(1), 1000)
    mean_rate = NORMAL.rate.mean()
    assert np.average(NORMAL.rate, weights=allocation) > 2 * mean_rate
    assert allocation[NORMAL.rate < 0.1 * mean_rate].sum() < 0.1 * allocation[NORMAL.rate > mean_rate].sum()
    assert allocation.max() > 1


@pytest.mark.parametrize("draws", [1, 5])
def test_the_order_of_sources_makes_no_difference(draws: int) -> None:
    """The allocation belongs to the sources: shuffled sources get the same, each its own."""
    tally = NORMAL.uniform(draws)
    order = np.random.default_rng(2).permutation(2000)
    np.testing.assert_array_equal(allocated(arranged(tally, order), 3000), allocated(tally, 3000)[order])


def test_rare_confusions_are_worth_more() -> None:
    """Of new sources alike, those whose confusion was hardly found yet are tried first."""
    same = Odds.planted(np.full(400, 1.5), blur=0.0)
    rare = np.arange(400) % 2 == 0
    tally = replace(same.uniform(0), confusion_failures=np.where(rare, 0, 500))
    allocation = allocate(tally, decodes=200, limit=5, uniform_decodes=1)
    np.testing.assert_array_equal(allocation, rare)


def test_one_source_can_be_searched() -> None:
    """A search of a single source is planned as any other."""
    one = Odds.planted(np.array([1.0]))
    for draws in range(4):
        assert allocated(one.uniform(draws), 3) == [3]


def planted_steps(count: int = 3000, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Plant a gradient of the margin for each of two classes; return labels, steps, changes and gradients."""
    random = np.random.default_rng(seed)
    gradient = np.array([[3.0, 0.0, -1.0, 0.0], [0.0, -2.0, 0.0, 0.5]])
    label, step = random.integers(0, 2, count), random.standard_normal((count, 4))
    change = np.array([-1.0, 2.0])[label] + (step * gradient[label]).sum(axis=1) + random.standard_normal(count)
    return label, step, change, gradient


def test_directions_are_the_planted_gradients() -> None:
    """For each class the direction in which the margin rises most, of length 1; none where nothing was decoded."""
    label, step, change, gradient = planted_steps()
    directions = DirectionSums.of(label, step, change, 3).directions()
    expected = gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    np.testing.assert_allclose(directions[:2], expected, atol=0.06)
    np.testing.assert_array_equal(directions[2], np.zeros(4))


def test_a_shifted_noise_model_has_the_same_directions() -> None:
    """Steps that are not centred, as those of the released code, hide no gradient."""
    label, step, change, gradient = planted_steps()
    directions = DirectionSums.of(label, step + 20.0, change, 2).directions()
    expected = gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    np.testing.assert_allclose(directions, expected, atol=0.06)


@given(border=st.integers(0, 60))
def test_sums_of_parts_are_the_sums_of_the_whole(border: int) -> None:
    """It does not matter who decoded what: sums add up."""
    label, step, change, _ = planted_steps(60)
    parts = [
        DirectionSums.of(label[rows], step[rows], change[rows], 2) for rows in (slice(border), slice(border, None))
    ]
    whole = DirectionSums.of(label, step, change, 2).arrays()
    for name, array in (parts[0] + parts[1]).arrays().items():
        np.testing.assert_allclose(array, whole[name], atol=1e-9)
