"""Where it looks: the same failures with fewer decodes, and the first of them sooner."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.identify.bench import CAP, UNIFORM_DRAWS, Bench
from benchmarks.identify.peer import better_threads, run_released
from benchmarks.stand import Array, Search, confusions, distinct_sources
from services.storage.keys import SEARCHED_SPLIT

_FINE_ROUNDS = 24  # fine enough to stop soon after the failures of the uniform search
_TRUTH_DRAWS = 60


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A uniform search, and ours until it found as many failures; the latter's failures cut to that number."""

    uniform: Search
    ours: Search
    theirs: dict[str, Array]
    own: dict[str, Array]

    @property
    def confusions(self) -> tuple[int, int]:
        return len(confusions(self.own)), len(confusions(self.theirs))

    @property
    def sources(self) -> tuple[int, int]:
        return distinct_sources(self.own), distinct_sources(self.theirs)


def budget(bench: Bench) -> dict[str, Any]:
    """Find as many valid failures as a uniform search with fewer decodes, as broadly; over seeds, and all together."""
    pairs = [_searched(bench, seed) for seed in range(bench.sizes.seeds)]
    failures, uniform_decodes, own_decodes = (
        [pair.uniform.counts.failures for pair in pairs],
        [pair.uniform.counts.decodes for pair in pairs],
        [pair.ours.counts.decodes for pair in pairs],
    )
    knowing = _knowing_decodes(bench, failures[0])
    radius = {side: np.concatenate([getattr(pair, side)["radius_sd"] for pair in pairs]) for side in ("theirs", "own")}
    return {
        "uniform_failures": failures,
        "uniform_decodes": uniform_decodes,
        "own_failures": [pair.ours.counts.failures for pair in pairs],
        "own_decodes": own_decodes,
        "budget_ratio": _pooled(zip(uniform_decodes, own_decodes, strict=True)),
        "budget_ratio_all_decodes": _pooled((_all_decodes(pair.uniform), _all_decodes(pair.ours)) for pair in pairs),
        "distinct_sources_ratio": _pooled(pair.sources for pair in pairs),
        "distinct_confusions_ratio": _pooled(pair.confusions for pair in pairs),
        "distinct_sources_ratios": [_pooled([pair.sources]) for pair in pairs],
        "distinct_confusions_ratios": [_pooled([pair.confusions]) for pair in pairs],
        "oracle_share": round((uniform_decodes[0] - own_decodes[0]) / max(uniform_decodes[0] - knowing, 1), 3),
        "median_radius_uniform": round(float(np.median(radius["theirs"])), 3) if len(radius["theirs"]) else None,
        "median_radius_own": round(float(np.median(radius["own"])), 3) if len(radius["own"]) else None,
    }


def _searched(bench: Bench, seed: int) -> _Pair:
    uniform = bench.prepared(
        f"uniform-{seed}",
        seed=seed,
        search={"strategy": "STRATEGY_UNIFORM", "draws_per_source": UNIFORM_DRAWS},
    ).until(sys.maxsize)
    ours = bench.prepared(
        f"ours-{seed}", seed=seed, search={"draws_per_source": UNIFORM_DRAWS, "rounds": _FINE_ROUNDS}
    ).until(uniform.counts.failures)
    own = _first(ours.failures(), uniform.counts.failures)
    return _Pair(uniform=uniform, ours=ours, theirs=uniform.failures(), own=own)


def _all_decodes(search: Search) -> int:
    return int(search.counts.decodes + search.counts.decodes_again)


def _pooled(pairs: Iterable[tuple[int, int]]) -> float | None:
    """Return the sum of the first over the sum of the second numbers; None where the second are nothing."""
    over, under = (sum(numbers) for numbers in zip(*pairs, strict=True))
    return round(over / under, 3) if under else None


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
