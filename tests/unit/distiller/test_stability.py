import numpy as np

from services.distiller.grouping import GroupingConfig, bootstrap_stability, group_failures
from tests.unit.distiller.failures import planted

CONFIG = GroupingConfig(kind="error_aware", classes=3, sd_agg=np.ones(2), max_components=20, min_support=15, seed=0)


def test_clusters_are_stable_and_arbitrary_cuts_are_not() -> None:
    """A planted cluster is found again in every bootstrap; half of one, cut at random, is not."""
    truth = planted(held_out_share=0.0)
    groups = [found.members for found in group_failures(truth.failures, truth.held_out, CONFIG).groups]
    whole = bootstrap_stability(truth.failures, groups, CONFIG, bootstraps=4)
    assert (whole > 0.95).all()
    divided = bootstrap_stability(truth.failures, [members[::2] for members in groups], CONFIG, bootstraps=4)
    assert (divided < 0.6).all()


def test_no_groups() -> None:
    """Nothing is fitted for nothing."""
    assert bootstrap_stability(planted().failures, [], CONFIG, bootstraps=4).shape == (0,)


def test_same_seed_same_stability() -> None:
    """The draws depend on the seed alone."""
    truth = planted(held_out_share=0.0)
    groups = [np.flatnonzero(truth.cluster == 0)[::2]]
    first, again = (bootstrap_stability(truth.failures, groups, CONFIG, bootstraps=2) for _ in range(2))
    np.testing.assert_array_equal(first, again)
