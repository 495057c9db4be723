"""Which of the points of a correction becomes the candidate: a rule, written beside the result."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.statistics.paired_tests import PairedDifference

RULE = (
    "of the points whose test accuracy is non-inferior (the 95 % interval of the paired difference to the base version "
    "lies above -{margin:g}) the best on the region images that decide, held-out failures and fresh images around the "
    "regions: the largest accuracy, and of those whose 95 % interval reaches the largest, the smallest loss; where no "
    "point is non-inferior, the one with the least possible loss of test accuracy"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one point: how it reads the region images that decide, and the change on the test images."""

    region_accuracy: float
    # Upper end of its interval.
    region_accuracy_high: float
    # Mean cross entropy.
    region_loss: float
    test_change: PairedDifference

    def is_non_inferior(self, margin: float) -> bool:
        """Say whether the test accuracy has fallen by less than the margin, for certain."""
        return self.test_change.interval()[0] > -margin


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Position of the point, and whether the rule was kept or none could keep it."""

    position: int
    non_inferior: bool


def choose(points: Sequence[Measured], margin: float) -> Chosen:
    """Apply `RULE` to one point or more; of equals the first is taken.

    Accuracy alone cannot tell points that are nearly alike.
    """
    accepted = [position for position, point in enumerate(points) if point.is_non_inferior(margin)]
    if not accepted:
        least_harm = max(range(len(points)), key=lambda position: points[position].test_change.interval()[0])
        return Chosen(position=least_harm, non_inferior=False)
    largest = max(points[position].region_accuracy for position in accepted)
    best = [position for position in accepted if points[position].region_accuracy_high >= largest]
    return Chosen(position=min(best, key=lambda position: points[position].region_loss), non_inferior=True)
