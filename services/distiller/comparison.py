"""What became of the regions of one run in another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2

from services.statistics.gaussian import Gaussian

# Regions of one confusion whose means are farther apart, in sds of the regions, are not the same one, unless chance
# alone can part them as far.
_LARGEST_SHIFT_SD = 3.0
# What one run has as one region, another may have as two: each of these overlaps with it as much (Bhattacharyya).
_PART = 0.3
_CONFIDENCE = 0.99


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a region lies, what it is, by the names of its true and predicted class, and how many sources it has."""

    confusion: tuple[str, str]
    gaussian: Gaussian
    sources: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Positions of a region before and after, how far it shifted, and whether by more than chance."""

    before: int
    after: int
    shift_sd: float
    moved: bool


def pairs(before: Sequence[Place], after: Sequence[Place]) -> list[Pair]:
    """Pair regions of the same confusion one to one, nearest to each other in all; the least shift first.

    Of those left over, parts of a region of the other run are paired with it, too. Regions without a pair are new or
    gone. Both runs must lie in the same latent space.
    """
    found = list(_one_to_one(before, after))
    found += _parts(before, after, {i for i, _ in found}, {j for _, j in found})
    told = [_pair(before, after, i, j) for i, j in found]
    return sorted(told, key=lambda pair: (pair.shift_sd, pair.before, pair.after))


def _one_to_one(before: Sequence[Place], after: Sequence[Place]) -> Iterator[tuple[int, int]]:
    shift = np.array([[_shift_sd(one, other) for other in after] for one in before]).reshape(len(before), len(after))
    limit = np.array([[_limit_sd(one, other) for other in after] for one in before]).reshape(shift.shape)
    # One that is no match costs more than all matches together.
    cost = np.where(shift <= limit, shift, 1e3 * (1 + len(before) + len(after)))
    for i, j in zip(*linear_sum_assignment(cost), strict=True):
        if shift[i, j] <= limit[i, j]:
            yield int(i), int(j)


def _parts(
    before: Sequence[Place], after: Sequence[Place], paired: set[int], paired_after: set[int]
) -> Iterator[tuple[int, int]]:
    """Yield for regions left over the one of the other run that they are a part of."""
    overlap = np.array([[_overlap(one, other) for other in after] for one in before]).reshape(len(before), len(after))
    if not overlap.size:
        return
    lone = [(i, int(overlap[i].argmax())) for i in range(len(before)) if i not in paired]
    lone += [(int(overlap[:, j].argmax()), j) for j in range(len(after)) if j not in paired_after]
    yield from ((i, j) for i, j in lone if overlap[i, j] >= _PART)


def _pair(before: Sequence[Place], after: Sequence[Place], i: int, j: int) -> Pair:
    shift = _shift_sd(before[i], after[j])
    return Pair(before=i, after=j, shift_sd=shift, moved=shift > _chance_sd(before[i], after[j]))


def _shift_sd(one: Place, other: Place) -> float:
    return one.gaussian.shift_sd(other.gaussian) if one.confusion == other.confusion else np.inf


def _overlap(one: Place, other: Place) -> float:
    return one.gaussian.overlap(other.gaussian) if one.confusion == other.confusion else 0.0


def _limit_sd(one: Place, other: Place) -> float:
    return max(_LARGEST_SHIFT_SD, _chance_sd(one, other))


def _chance_sd(one: Place, other: Place) -> float:
    """Return how far apart the means of one region, found twice, may be by chance (99 %, Hotelling's test)."""
    noise = 1 / one.sources + 1 / other.sources
    return float(np.sqrt(noise * chi2.ppf(_CONFIDENCE, len(one.gaussian.mean))))
