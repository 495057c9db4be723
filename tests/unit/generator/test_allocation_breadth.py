"""How broad a search is: how many different sources its failures come from, for their number."""

import numpy as np
import pytest

from services.generator.allocation import SourceStatistics, uniform_breadth
from tests.unit.generator.odds import Odds


def fruitful_and_others(seed: int) -> Odds:
    """Plant a few sources that fail at every second draw or more, among many that fail once in a hundred draws."""
    random = np.random.default_rng(seed)
    few = np.arange(4000) % 50 == 0
    mean = np.where(few, random.normal(-0.5, 0.3, 4000), random.normal(2.6, 0.4, 4000))
    return Odds.planted(mean, draws=100, seed=seed)


def breadth(tally: SourceStatistics) -> float:
    return float((tally.failures > 0).sum() / tally.failures.sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_failures_come_from_as_many_sources_as_a_uniform_search_finds(seed: int) -> None:
    """A few very fruitful sources do not draw the search away from the many others: no breadth is lost."""
    odds = fruitful_and_others(seed)
    adaptive, uniform = odds.adaptive(10, limit=5), odds.uniform(10, limit=5)
    assert breadth(adaptive) >= breadth(uniform)
    assert adaptive.failures.sum() > 1.1 * uniform.failures.sum()


def test_without_a_limit_too() -> None:
    """Where every failure of a source counts, breadth must hold all the more."""
    odds = fruitful_and_others(0)
    adaptive, uniform = odds.adaptive(10), odds.uniform(10)
    assert breadth(adaptive) >= 0.95 * breadth(uniform)
    assert adaptive.failures.sum() > 1.1 * uniform.failures.sum()


@pytest.mark.parametrize("rounds", [2, 5, 8])
def test_the_budget_is_never_exceeded(rounds: int) -> None:
    """All rounds together decode as often as a uniform search would, or less; with room enough, as often."""
    odds = fruitful_and_others(3)
    spent = odds.adaptive(6, rounds=rounds).decodes.sum()
    assert spent == 6 * 4000


@pytest.mark.parametrize("limit", [1, 5, 100])
@pytest.mark.parametrize("decodes", [5, 20, 60])
def test_breadth_is_foretold_from_one_round(decodes: int, limit: int) -> None:
    """One decode of each source tells how broad a uniform search of many would be, where margins tell rates."""
    odds = Odds.planted(np.random.default_rng(4).normal(2.0, 1.0, 6000), blur=0.0, draws=60)
    foretold = uniform_breadth(odds.uniform(1, limit), decodes=decodes, limit=limit)
    assert foretold == pytest.approx(breadth(odds.uniform(decodes, limit)), rel=0.1)


def test_later_rounds_do_not_change_what_is_foretold() -> None:
    """Only the first round counts, in which nobody was preferred."""
    odds = fruitful_and_others(0)
    first = odds.uniform(1, 5)
    later = odds.after(first, np.where(odds.mean < 0, 30, 0), 5)
    assert later.failures.sum() > 2 * first.failures.sum()
    assert uniform_breadth(later, decodes=10, limit=5) == uniform_breadth(first, decodes=10, limit=5)


def test_without_failures_breadth_is_all() -> None:
    """Where nothing was found yet, the first failures should all be of different sources."""
    odds = Odds.planted(np.full(50, 9.0))
    assert uniform_breadth(odds.uniform(1), decodes=10, limit=5) == 1.0
