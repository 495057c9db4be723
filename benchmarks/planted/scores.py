"""Scores of one arm: its regions, and accuracy on hidden images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.planted.spots import PlantedSpot, SpotPlan
from benchmarks.stand import Array
from services.storage.catalog import estimate

Answers = Callable[[Array], Array]
Confusion = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class RegionReading:
    """A region's confusion, and what the oracle reads on its pictures."""

    confusion: Confusion
    # Whether the oracle reads the predicted label in more than half of the pictures.
    oracle_agrees: bool


def region_scores(regions: Sequence[RegionReading], confusions: Sequence[Confusion]) -> dict[str, Any]:
    """Return recall, ranks and false regions; regions are in order of score.

    Only the first `2 x spots + 3` regions count for recall and false regions: a person looks at no more.
    """
    first = regions[: 2 * len(confusions) + 3]
    ranks = [
        next((rank for rank, region in enumerate(regions, start=1) if region.confusion == confusion), None)
        for confusion in confusions
    ]
    false = [region for region in first if region.confusion not in confusions and region.oracle_agrees]
    return {
        "recall": round(sum(rank is not None and rank <= len(first) for rank in ranks) / len(confusions), 4),
        "ranks": ranks,
        "false_regions": round(len(false) / len(first), 4) if first else None,
        "regions": len(regions),
    }


def planted_share(failures: Sequence[Confusion], confusions: Sequence[Confusion]) -> float | None:
    """Return which share of failures is of planted confusions; None without failures."""
    if not failures:
        return None
    return round(sum(failure in confusions for failure in failures) / len(failures), 4)


def spot_accuracies(answers: Answers, plan: SpotPlan) -> list[float]:
    """Return the accuracy on the hidden images of each spot."""
    return [spot_accuracy(answers, plan, spot)["value"] for spot in plan.spots]


def spot_accuracy(answers: Answers, plan: SpotPlan, spot: PlantedSpot) -> dict[str, Any]:
    """Return the accuracy on a spot's hidden images.

    The 95 % interval is the exact one of Clopper and Pearson (1934).
    """
    images = plan.scored_images(spot)
    found = estimate(int((answers(images) == spot.true_label).sum()), len(images))
    return {name: round(getattr(found, name), 4) for name in ("value", "low", "high", "trials")}


def after_over_ceiling(after: Sequence[float], ceiling: Sequence[float]) -> float | None:
    """Return the least ratio over the spots.

    It is None where no ceiling is above zero.
    """
    ratios = [one / limit for one, limit in zip(after, ceiling, strict=True) if limit > 0]
    return round(min(ratios), 4) if ratios else None


def accuracy(answers: Answers, images: Array, labels: Array) -> float:
    return float((answers(images) == labels).mean())
