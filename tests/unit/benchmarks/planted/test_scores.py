"""Regions are scored against planted confusions."""

from benchmarks.planted.scores import RegionReading, after_over_ceiling, planted_share, region_scores


def test_only_the_first_regions_count_for_recall() -> None:
    def reading(true: int, predicted: int, *, agrees: bool = False) -> RegionReading:
        return RegionReading(confusion=(true, predicted), oracle_agrees=agrees)

    others = [reading(8, 9), reading(7, 9, agrees=True), *[reading(5, 6)] * 5]
    found = region_scores([reading(1, 2), *others, reading(3, 4)], [(1, 2), (3, 4), (0, 9)])
    assert found == {"recall": 0.6667, "ranks": [1, 9, None], "false_regions": 0.1111, "regions": 9}
    # With two spots only the first seven count.
    assert region_scores([*others, reading(1, 2), reading(3, 4)], [(1, 2), (3, 4)])["recall"] == 0.0
    # A region of a spot is never false.
    assert region_scores([reading(1, 2, agrees=True)], [(1, 2)])["false_regions"] == 0.0


def test_without_regions_nothing_is_found_and_nothing_false() -> None:
    assert region_scores([], [(1, 2)]) == {"recall": 0.0, "ranks": [None], "false_regions": None, "regions": 0}
    assert planted_share([], [(1, 2)]) is None
    assert planted_share([(1, 2), (2, 1)], [(1, 2)]) == 0.5


def test_the_worst_spot_is_held_against_its_own_ceiling() -> None:
    assert after_over_ceiling([0.5, 0.9], [0.5, 1.0]) == 0.9
    assert after_over_ceiling([0.5, 0.9], [0.0, 1.0]) == 0.9
    assert after_over_ceiling([0.5], [0.0]) is None
