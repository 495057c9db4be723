"""What became of the regions of one run in another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.distiller.gaussian import Gaussian

# Regions of one confusion whose means are farther apart than this are not the same one, and nearer than that it has not
# moved: docs/method.md, "Regions of two runs".
LARGEST_SHIFT_SD, STILL_SD = 1.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a region lies, and what it is: the names of its true and predicted class."""

    confusion: tuple[str, str]
    gaussian: Gaussian


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Positions of a region before and after, and how far it shifted."""

    before: int
    after: int
    shift_sd: float

    @property
    def moved(self) -> bool:
        return self.shift_sd > STILL_SD


def pairs(before: Sequence[Place], after: Sequence[Place]) -> list[Pair]:
    """Pair each region with the nearest of the other run that has the same confusion, the least shift first.

    What one run has as one region the other may have as two: both are then paired with it. Regions without a pair are
    new or gone. Both runs must lie in the same latent space.
    """
    shift = np.full((len(before), len(after)), np.inf)
    for i, one in enumerate(before):
        for j, other in enumerate(after):
            if one.confusion == other.confusion:
                shift[i, j] = one.gaussian.shift_sd(other.gaussian)
    if not shift.size:
        return []
    nearest = {(i, int(shift[i].argmin())) for i in range(len(before))}
    nearest |= {(int(shift[:, j].argmin()), j) for j in range(len(after))}
    found = [
        Pair(before=i, after=j, shift_sd=float(shift[i, j])) for i, j in nearest if shift[i, j] <= LARGEST_SHIFT_SD
    ]
    return sorted(found, key=lambda pair: (pair.shift_sd, pair.before, pair.after))
