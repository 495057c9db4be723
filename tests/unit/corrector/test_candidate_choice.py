from services.corrector.candidate_choice import RULE, ChosenPoint, MeasuredPoint, choose
from services.statistics.hypothesis_tests import AccuracyDifference


def point(region_accuracy: float, gained: int, lost: int, trials: int = 10_000, *, loss: float = 0.5) -> MeasuredPoint:
    return MeasuredPoint(
        region_accuracy=region_accuracy,
        region_accuracy_high=min(1.0, region_accuracy + 0.05),
        region_loss=loss,
        test_change=AccuracyDifference(gained=gained, lost=lost, trials=trials),
    )


def test_the_best_of_those_that_cost_nothing() -> None:
    """The largest region accuracy wins among the non-inferior; a better one that costs too much does not."""
    points = [point(0.7, 20, 10), point(0.9, 20, 30), point(0.99, 10, 200)]
    assert choose(points, 0.01) == ChosenPoint(position=1, non_inferior=True)


def test_what_could_cost_too_much_is_not_accepted() -> None:
    """On few images the same share of changes proves nothing: the interval decides, not the difference."""
    assert choose([point(0.9, 2, 3, 1_000)], 0.01).non_inferior
    assert not choose([point(0.9, 2, 3, 100)], 0.01).non_inferior


def test_of_those_that_cannot_be_told_apart_the_smallest_loss() -> None:
    """Where accuracies are as near as chance the surer one wins, not the one that was lucky by an image."""
    points = [point(0.97, 10, 10, loss=0.2), point(0.99, 30, 10, loss=0.4), point(0.9, 10, 10, loss=0.1)]
    assert choose(points, 0.01).position == 0
    assert choose([point(1.0, 30, 10, loss=0.2), point(1.0, 10, 10, loss=0.1)], 0.01).position == 1


def test_of_equals_the_first() -> None:
    """The order of trying decides what nothing else does."""
    assert choose([point(0.9, 10, 10), point(0.9, 20, 10)], 0.01).position == 0


def test_where_all_cost_too_much_the_least_harm_is_chosen_and_said() -> None:
    """There is a candidate to look at, which says that it is not non-inferior."""
    points = [point(0.99, 0, 500), point(0.5, 0, 150), point(0.7, 0, 200)]
    assert choose(points, 0.01) == ChosenPoint(position=1, non_inferior=False)


def test_the_rule_states_the_margin() -> None:
    """The rule beside the result names the margin that was applied."""
    assert "above -0.003)" in RULE.format(margin=0.003)
