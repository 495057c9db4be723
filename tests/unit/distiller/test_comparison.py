import numpy as np

from services.distiller.region_diff import RegionPlace, match_regions
from services.statistics.gaussian import Gaussian


def place(confusion: str, x: float, *, sources: int = 1000, sd: float = 1.0) -> RegionPlace:
    true, predicted = confusion
    gaussian = Gaussian(mean=np.array([x, 0.0]), covariance=sd**2 * np.eye(2))
    return RegionPlace(confusion=(true, predicted), gaussian=gaussian, sources=sources)


def test_regions_are_paired_by_confusion_and_place() -> None:
    """The same place and confusion is kept, a little aside is moved; another confusion or place is no pair."""
    before = [place("71", 0.0), place("49", 0.0), place("06", 5.0), place("83", 0.0)]
    after = [place("49", 0.7), place("71", 0.1), place("06", 0.0), place("52", 0.0)]
    found = match_regions(before, after)
    assert [(pair.before, pair.after, pair.moved) for pair in found] == [(0, 1, False), (1, 0, True)]
    np.testing.assert_allclose([pair.shift_sd for pair in found], [0.1, 0.7])


def test_few_sources_may_lie_apart_by_chance() -> None:
    """The same shift is a move for regions of many sources and none for those of few."""
    for sources, moved in ((1000, True), (10, False)):
        [pair] = match_regions([place("71", 0.0, sources=sources)], [place("71", 0.7, sources=sources)])
        assert pair.moved is moved


def test_means_found_twice_have_rarely_moved() -> None:
    """Of regions drawn twice from one law in 16 dimensions, one in a hundred is called moved."""
    random, covariance = np.random.default_rng(0), np.eye(16)
    moved = 0
    for _ in range(500):
        one, other = (
            RegionPlace(
                confusion=("7", "1"),
                gaussian=Gaussian(mean=random.standard_normal((40, 16)).mean(axis=0), covariance=covariance),
                sources=40,
            )
            for _ in range(2)
        )
        moved += match_regions([one], [other])[0].moved
    assert moved <= 15


def test_of_two_of_a_confusion_one_may_be_gone_or_new() -> None:
    """Neighbours are told apart: the one that is left is paired, the other is gone; and the other way round."""
    two, one = [place("71", 0.0), place("71", 3.5)], [place("71", 0.1)]
    assert [(pair.before, pair.after) for pair in match_regions(two, one)] == [(0, 0)]
    assert [(pair.before, pair.after) for pair in match_regions(one, two)] == [(0, 0)]


def test_what_is_one_region_in_one_run_may_be_two_in_the_other() -> None:
    """Both halves are paired with the whole that they overlap with, so neither is new."""
    found = match_regions([place("71", 0.0, sd=1.5)], [place("71", -1.0), place("71", 1.0)])
    assert sorted((pair.before, pair.after) for pair in found) == [(0, 0), (0, 1)]


def test_runs_without_regions() -> None:
    """There is nothing to pair with nothing."""
    assert match_regions([], [place("71", 0.0)]) == match_regions([place("71", 0.0)], []) == match_regions([], []) == []
