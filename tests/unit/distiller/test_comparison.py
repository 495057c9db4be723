import numpy as np

from services.distiller.comparison import Place, pairs
from services.distiller.gaussian import Gaussian


def place(confusion: str, x: float) -> Place:
    true, predicted = confusion
    return Place(confusion=(true, predicted), gaussian=Gaussian(mean=np.array([x]), covariance=np.eye(1)))


def test_regions_are_paired_by_confusion_and_place() -> None:
    """The same place and confusion is kept, a little aside is moved; another confusion or place is no pair."""
    before = [place("71", 0.0), place("49", 0.0), place("06", 5.0), place("83", 0.0)]
    after = [place("49", 0.7), place("71", 0.1), place("06", 0.0), place("52", 0.0)]
    found = pairs(before, after)
    assert [(pair.before, pair.after, pair.moved) for pair in found] == [(0, 1, False), (1, 0, True)]
    np.testing.assert_allclose([pair.shift_sd for pair in found], [0.1, 0.7])


def test_what_is_one_region_in_one_run_may_be_two_in_the_other() -> None:
    """Both halves are paired with the whole, so neither is new."""
    found = pairs([place("71", 0.0)], [place("71", -0.4), place("71", 0.4)])
    assert sorted((pair.before, pair.after) for pair in found) == [(0, 0), (0, 1)]


def test_runs_without_regions() -> None:
    """There is nothing to pair with nothing."""
    assert pairs([], [place("71", 0.0)]) == pairs([place("71", 0.0)], []) == []
