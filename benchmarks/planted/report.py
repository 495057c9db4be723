"""Medians over the seeds of a measurement, by data set and rendering."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
# Figures of an arm that are one number, or None where they were not measured.
_NUMBERS = (
    *("recall", "false_regions", "planted_share", "regions", "failures"),
    *("clean_before", "clean_change", "after_over_ceiling", "label_model_accuracy", "reconstructions_lost"),
)
# Figures of an arm that are a number for each spot.
_SPOTS = ("spots_before", "spots_after", "ceiling", "lift", "jitter_lift")


def read_results(directory: Path, *, digest: str, smoke: bool) -> tuple[list[Result], int]:
    """Return the results of a digest, and the number of others."""
    found = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    of_kind = [result for result in found if result["smoke"] == smoke]
    chosen = [result for result in of_kind if result["digest"] == digest]
    return chosen, len(of_kind) - len(chosen)


def report(results: Iterable[Result]) -> dict[str, Any]:
    """Return an object for each data set, with each rendering inside.

    Absent plants and chosen kinds are data sets of their own: their figures say something else.
    """
    groups: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        plant = [] if result["plant"] == "mislabelled" else [result["plant"]]
        groups[" ".join([result["data"], *plant, *result["kinds"]])][result["rendering"]].append(result)
    return {
        data: {rendering: summary(found) for rendering, found in sorted(renderings.items())}
        for data, renderings in sorted(groups.items())
    }


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return medians over seeds.

    Figures of spots are medians over the spots of all seeds.

    A figure that some seed lacks is the median of the others, and None where all lack it.
    """
    results = sorted(results, key=lambda result: int(result["seed"]))
    return {
        "seeds": [result["seed"] for result in results],
        "spots": [len(result["spots"]) for result in results],
        "states": [result["error_reason"] or result["state"] for result in results],
        "renderings_used": [result["rendering_used"] for result in results],
        **{name: median(result.get(name) for result in results) for name in _NUMBERS},
        "ranks": [result["ranks"] for result in results],
        **{name: median(_of_spots(results, name)) for name in _SPOTS},
        "worst_before": median(max(result["spots_before"]) for result in results),
        "worst_after": median(min(result["spots_after"]) for result in results),
        "baselines": _baselines(results),
        "seconds": _seconds(results),
        "by_kind": _by_kind(results),
    }


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of what was measured; None of nothing."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


def _of_spots(results: Iterable[Result], name: str) -> list[float]:
    return [value for result in results for value in result.get(name, [])]


def _baselines(results: Sequence[Result]) -> dict[str, Any]:
    """Return each baseline's figures, over the seeds that have it."""
    names = sorted({name for result in results for name in result["baselines"]})
    figures = {}
    for name in names:
        having = [result for result in results if name in result["baselines"]]
        found = [result["baselines"][name] for result in having]
        figures[name] = {
            "spots": median(value for one in found for value in one["spots"]),
            "worst": median(min(one["spots"]) for one in found),
            "clean_change": median(one["clean_change"] for one in found),
            # By how much the worst spot of the correction is ahead.
            "ahead": median(
                min(result["spots_after"]) - min(one["spots"]) for result, one in zip(having, found, strict=True)
            ),
        }
    return figures


def _seconds(results: Sequence[Result]) -> dict[str, float | None]:
    stages = dict.fromkeys(stage for result in results for stage in result["seconds"])
    return {stage: median(result["seconds"].get(stage) for result in results) for stage in stages}


def _by_kind(results: Sequence[Result]) -> dict[str, Any]:
    """Return counts and accuracies of the spots of each kind."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        first = 2 * len(result["spots"]) + 3
        for position, spot in enumerate(result["spots"]):
            rank = result["ranks"][position]
            figures = {name: result[name][position] for name in ("spots_before", "spots_after")}
            figures["ceiling"] = result["ceiling"][position] if "ceiling" in result else None
            rows[spot["kind"]].append({"found": rank is not None and rank <= first, **figures})
    return {
        kind: {
            "spots": len(found),
            "found": sum(row["found"] for row in found),
            **{name: median(row[name] for row in found) for name in ("spots_before", "spots_after", "ceiling")},
        }
        for kind, found in sorted(rows.items())
    }
