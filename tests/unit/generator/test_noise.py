from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.generator.noise import choose, is_held_out, released, standard_normal

Law = Callable[..., npt.NDArray[Any]]
LAWS = pytest.mark.parametrize("law", [standard_normal, released])
SEEDS = st.integers(0, 2**64 - 1)
ROWS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**31 - 1)), min_size=1, max_size=20)


def test_noise_is_standard_normal() -> None:
    """Noise is N(0, I): centred, of unit variance, uncorrelated between dimensions and between draws."""
    eps = standard_normal(seed=3, source=np.arange(20_000) // 10, round_=0, draw=np.arange(20_000) % 10, dim=4)
    assert stats.kstest(eps.ravel(), "norm").pvalue > 0.01
    np.testing.assert_allclose(eps.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(eps.T), np.eye(4), atol=0.04)
    assert abs(np.corrcoef(eps[:-1, 0], eps[1:, 0])[0, 1]) < 0.03


def test_released_noise_is_not_centred() -> None:
    """The released law is Beta(50, 50) in each dimension: every draw is nearly the same shift by a half."""
    eps = released(seed=3, source=np.arange(5000), round_=0, draw=np.zeros(5000, int), dim=4)
    assert stats.kstest(eps.ravel(), stats.beta(50, 50).cdf).pvalue > 0.01
    assert eps.mean() == pytest.approx(0.5, abs=0.002)
    assert eps.std() == pytest.approx(0.05, abs=0.001)
    np.testing.assert_allclose(np.corrcoef(eps.T), np.eye(4), atol=0.05)


@LAWS
@given(seed=SEEDS, round_=st.integers(0, 100), rows=ROWS, data=st.data())
def test_noise_is_a_pure_function_of_its_identity(
    law: Law, seed: int, round_: int, rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A row of noise depends on (seed, source, round, draw) alone, not on the rows beside it; any seed will do."""
    source, draw = np.array(rows).T
    whole = law(seed=seed, source=source, round_=round_, draw=draw, dim=3)
    some = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1)))
    alone = law(seed=seed, source=source[some], round_=round_, draw=draw[some], dim=3)
    np.testing.assert_array_equal(whole[some], alone)
    assert np.isfinite(whole).all()


@LAWS
@pytest.mark.parametrize("other", [{"seed": 4}, {"source": [12]}, {"round_": 1}, {"draw": [1]}])
def test_noise_changes_with_each_part_of_the_identity(law: Law, other: dict[str, Any]) -> None:
    """Another seed, source, round or draw gives other noise in every dimension."""
    identity = {"seed": 3, "source": [11], "round_": 0, "draw": [0]}
    first, second = (
        law(**part | {"source": np.array(part["source"]), "draw": np.array(part["draw"])}, dim=6)
        for part in (identity, identity | other)
    )
    assert (np.abs(first - second) > 1e-9).all()


@given(seed=SEEDS, count=st.integers(0, 200), limit=st.integers(0, 300))
def test_chosen_positions_are_distinct_and_ascending(seed: int, count: int, limit: int) -> None:
    """At most `limit` of `count` positions are chosen, each once, ascending; all of them for limit 0."""
    chosen = choose(seed=seed, count=count, limit=limit)
    assert len(chosen) == (min(limit, count) if limit else count)
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(range(count))


def test_positions_are_chosen_by_seed() -> None:
    """The same seed chooses the same, another seed others, both from the whole range."""
    chosen = choose(seed=1, count=1000, limit=200)
    np.testing.assert_array_equal(chosen, choose(seed=1, count=1000, limit=200))
    assert len(np.intersect1d(chosen, choose(seed=2, count=1000, limit=200))) < 80
    assert stats.kstest(chosen / 1000, "uniform").pvalue > 0.01


def test_held_out_sources_are_a_share_drawn_by_seed_and_source() -> None:
    """The share is as asked for, the same whichever sources are asked about, and independent of the choice."""
    sources = np.arange(20_000)
    held_out = is_held_out(seed=1, source=sources, fraction=0.3)
    assert abs(held_out.mean() - 0.3) < 0.015
    np.testing.assert_array_equal(held_out[100:120], is_held_out(seed=1, source=sources[100:120], fraction=0.3))
    assert abs((held_out == is_held_out(seed=2, source=sources, fraction=0.3)).mean() - 0.58) < 0.02
    chosen = choose(seed=1, count=20_000, limit=5000)
    assert abs(held_out[chosen].mean() - 0.3) < 0.03
