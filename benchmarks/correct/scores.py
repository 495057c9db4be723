"""A version's accuracy on unseen real images: the planted spots, and everything outside."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from defuse.v1 import model_pb2

from benchmarks.regions.spots import Planted
from benchmarks.stand import Data
from services.corrector.evaluation import LocalVersion
from services.storage.catalog import LabelledImages


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy on the real test images of each spot, and outside of all."""

    spots: tuple[float, ...]
    outside: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One result of one seed: how it was made, and what it reads."""

    arm: str
    label: str
    score: Score
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Seed:
    """All results of one classifier and search, and what they took of a person."""

    before: Score
    results: Sequence[Result]
    decisions: int
    labelled: int
    failures: int

    def of(self, arm: str) -> Score:
        """Return the best score of an arm over its lambdas, by its worst spot; `chosen` is what the rule chose."""
        wanted = [result for result in self.results if (result.chosen if arm == "chosen" else result.arm == arm)]
        return max((result.score for result in wanted), key=lambda score: min(score.spots))


ARMS = (
    *("all_weights", "interpolation", "last_layer", "continued"),
    *("unclustered_equal_decisions", "unclustered_equal_images", "released"),
)


def summary(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Return the figures of the benchmark, medians over the seeds.

    The baselines are given the best of their lambdas, as the truth tells it; ours has to choose by its rule. Arms that
    the smoke run leaves out are not told.
    """
    arms = ["chosen", *(arm for arm in ARMS if any(result.arm == arm for result in seeds[0].results))]
    before = _medians([seed.before.spots for seed in seeds])
    spots = {arm: _medians([seed.of(arm).spots for seed in seeds]) for arm in arms}
    return {
        "spot_before": max(before),
        "spot_after": min(spots["chosen"]),
        "test_change": round(statistics.median(seed.of("chosen").outside - seed.before.outside for seed in seeds), 4),
        "spots_before": before,
        "spots_after": spots,
        "outside_before": round(statistics.median(seed.before.outside for seed in seeds), 4),
        "outside_after": {arm: round(statistics.median(seed.of(arm).outside for seed in seeds), 4) for arm in arms},
        "ahead_of": {
            arm: round(min(spots["chosen"]) - min(spots[arm]), 4)
            for arm in arms
            if arm not in {"chosen", "all_weights"}
        },
        "chosen": [result.label for seed in seeds for result in seed.results if result.chosen],
        "decisions": [seed.decisions for seed in seeds],
        "labelled": [seed.labelled for seed in seeds],
        "decisions_per_point": _decisions_per_point(seeds, "chosen"),
        "decisions_per_point_random_failures": _decisions_per_point(seeds, "unclustered_equal_decisions"),
        "by_lambda": _by_lambda(seeds),
    }


def _medians(scores: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the median over seeds of each spot."""
    return [round(statistics.median(values), 4) for values in zip(*scores, strict=True)]


def _decisions_per_point(seeds: Sequence[Seed], arm: str) -> float | None:
    """Return labels given for each point of accuracy gained, on the mean of the spots; none where nothing is gained."""
    ratios = []
    for seed in seeds:
        gained = 100 * (statistics.mean(seed.of(arm).spots) - statistics.mean(seed.before.spots))
        ratios.append(seed.decisions / gained if gained > 0 else float("inf"))
    found = statistics.median(ratios)
    return round(found, 3) if np.isfinite(found) else None


def _by_lambda(seeds: Sequence[Seed]) -> dict[str, Any]:
    scores = defaultdict(list)
    for seed in seeds:
        for result in seed.results:
            scores[result.label].append(result.score)
    return {
        label: {
            "spots": _medians([score.spots for score in found]),
            "outside": round(statistics.median(score.outside for score in found), 4),
        }
        for label, found in scores.items()
    }


def score(file: bytes, model: model_pb2.Model, data: Data, planted: Planted) -> Score:
    """Read the whole test split; spots are told by the truth that was planted."""
    test = LabelledImages(images=data.images["test"], labels=data.labels["test"])
    right = LocalVersion(file, model).reads_stored_correctly(test)
    inside = planted.spots.inside(test.images, test.labels)
    return Score(
        spots=tuple(round(float(right[spot].mean()), 4) for spot in inside),
        outside=round(float(right[~np.any(inside, axis=0)].mean()), 4),
    )
