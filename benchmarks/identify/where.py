"""Where it looks: the same failures with fewer decodes, and the first of them sooner."""

import sys
from typing import Any

import numpy as np

from benchmarks.identify.bench import CAP, UNIFORM_DRAWS, Bench
from benchmarks.identify.peer import better_threads, run_released
from benchmarks.stand import Array, confusions, distinct_sources
from services.generator.workbench import SEARCHED_SPLIT

_FINE_ROUNDS = 24  # fine enough to stop soon after the failures of the uniform search
_TRUTH_DRAWS = 60


def budget(bench: Bench) -> dict[str, Any]:
    """Find as many valid failures as a uniform search with fewer decodes, as broadly."""
    uniform = bench.prepared("uniform", search={"strategy": "STRATEGY_UNIFORM", "draws_per_source": UNIFORM_DRAWS})
    uniform.until(sys.maxsize)
    ours = bench.prepared("ours", search={"draws_per_source": UNIFORM_DRAWS, "rounds": _FINE_ROUNDS})
    ours.until(uniform.counts.failures)
    theirs, own = uniform.failures(), _first(ours.failures(), uniform.counts.failures)
    ratio = uniform.counts.decodes / max(ours.counts.decodes, 1)
    knowing = _knowing_decodes(bench, uniform.counts.failures)
    gain = uniform.counts.decodes - ours.counts.decodes
    return {
        "uniform_failures": uniform.counts.failures,
        "uniform_decodes": uniform.counts.decodes,
        "own_failures": ours.counts.failures,
        "own_decodes": ours.counts.decodes,
        "budget_ratio": round(ratio, 2),
        "budget_ratio_all_decodes": round(
            (uniform.counts.decodes + uniform.counts.decodes_again) / (ours.counts.decodes + ours.counts.decodes_again),
            2,
        ),
        "distinct_sources_ratio": round(distinct_sources(own) / max(distinct_sources(theirs), 1), 3),
        "distinct_confusions_ratio": round(len(confusions(own)) / max(len(confusions(theirs)), 1), 3),
        "oracle_share": round(gain / max(uniform.counts.decodes - knowing, 1), 3),
        "median_radius_uniform": round(float(np.median(theirs["radius_sd"])), 3) if len(theirs["source"]) else None,
        "median_radius_own": round(float(np.median(own["radius_sd"])), 3) if len(own["source"]) else None,
    }


def _first(failures: dict[str, Array], count: int) -> dict[str, Array]:
    """Return so many failures, those of earlier rounds first; a round is cut at random, not by source."""
    shuffled = np.random.default_rng(0).permutation(len(failures["source"]))
    order = shuffled[np.argsort(failures["round"][shuffled], kind="stable")][:count]
    return {name: array[order] for name, array in failures.items()}


def _knowing_decodes(bench: Bench, failures: int) -> float:
    """Return the decodes that a search would need which knows every source's rate of valid failures beforehand.

    It spends them on the most fruitful sources first, until each has given five. Rates are counted on a sample of the
    sources, in draws of their own.
    """
    truth = bench.prepared(
        "truth",
        search={
            "strategy": "STRATEGY_UNIFORM",
            "draws_per_source": _TRUTH_DRAWS,
            "max_failures_per_source": _TRUTH_DRAWS,
            "max_sources": max(bench.sizes.sources // 5, 1),
        },
    ).until(sys.maxsize)
    _, counts = np.unique(truth.failures()["source"], return_counts=True)
    rates = np.sort(counts / _TRUTH_DRAWS)[::-1]
    wanted = failures * truth.counts.sources / max(min(bench.sizes.sources, len(bench.data.labels[SEARCHED_SPLIT])), 1)
    needed = int(np.searchsorted(np.cumsum(np.full(len(rates), CAP)), wanted)) + 1
    scale = failures / max(wanted, 1)
    return float((CAP / rates[:needed]).sum() * scale) if len(rates) else float("inf")


def time_to_failures(bench: Bench) -> dict[str, Any]:
    """Find the first so many valid failures, against the released recipe with centred noise and the same filters."""
    goal = bench.sizes.failures
    ours = bench.prepared("first", search={"draws_per_source": 50, "rounds": 50})
    ours.until(goal)
    found = min(ours.counts.failures, goal)
    threads, _ = better_threads(bench, ours)
    pace = run_released(bench, ours, failures=found, seconds=bench.sizes.released_s, threads=threads)
    theirs = pace.seconds * found / pace.failures if pace.failures else float("inf")
    return {
        "time_to_failures": found,
        "time_to_failures_s": round(ours.seconds, 1),
        "time_to_failures_released_s": round(theirs, 1) if pace.failures else None,
        # The recipe was stopped at its time limit, or had no image left: its time is scaled to the same number.
        "released_time_is_extrapolated": pace.failures < found,
        f"time_to_{goal}_valid_failures_ratio": round(theirs / ours.seconds, 2) if pace.failures else None,
    }
