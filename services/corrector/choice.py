"""Which of the points of a correction becomes the candidate: a rule, written beside the result."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.corrector.paired import PairedDifference

RULE = (
    "the largest accuracy on held-out region images among the points whose test accuracy is non-inferior: the 95 % "
    "interval of the paired difference to the base version lies above -{margin:g}; of equals the one with the larger "
    "test accuracy, then the first; where no point is non-inferior, the one whose interval ends highest below"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one point: region images read correctly, and the change on the test images."""

    region_accuracy: float
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
    """Apply `RULE` to one point or more."""
    accepted = [position for position, point in enumerate(points) if point.is_non_inferior(margin)]
    if not accepted:
        least_harm = max(range(len(points)), key=lambda position: points[position].test_change.interval()[0])
        return Chosen(position=least_harm, non_inferior=False)
    best = max(accepted, key=lambda position: (points[position].region_accuracy, points[position].test_change.value))
    return Chosen(position=best, non_inferior=True)
