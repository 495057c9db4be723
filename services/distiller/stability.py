"""Whether groups are found again when the failures are drawn and grouped anew (Hennig, 2007, Jaccard bootstrap)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from services.arrays import Array
from services.distiller.grouping import GroupedFailures, Grouper, Grouping, GroupingConfig

# Failures that one bootstrap is fitted to, about: bounds its time, whatever the size of the run.
_MOST_FAILURES = 10_000
# Sets these draws apart from others of the same seed.
_STREAM = 1


def stability(
    failures: GroupedFailures,
    groups: Sequence[Array],
    config: GroupingConfig,
    *,
    bootstraps: int,
    check: Callable[[], None] = lambda: None,
) -> Array:
    """Return for each group, given by its members, the mean Jaccard index with its like in every bootstrap, (g,).

    Sources are drawn with replacement, each with all its failures: failures of one source are no independent draws. A
    source that is drawn twice counts once, as points at one place would be taken for a cluster. The mixture that is
    fitted to them then says of all failures where they belong. `check` may raise to stop.
    """
    scores = np.zeros((bootstraps, len(groups)))
    for number in range(bootstraps if groups else 0):
        drawn = failures.take(_drawn(failures.source, np.random.default_rng([config.seed, _STREAM, number])))
        found = Grouper(drawn, replace(config, seed=config.seed + number), check).labels(failures)
        _, labels = np.unique(found, return_inverse=True)
        sizes = np.bincount(labels)
        scores[number] = [_most_alike(members, labels, sizes) for members in groups]
    return np.asarray(scores.mean(axis=0))


def stability_of(
    grouping: Grouping,
    failures: GroupedFailures,
    held_out: Array,
    config: GroupingConfig,
    *,
    bootstraps: int,
    check: Callable[[], None] = lambda: None,
) -> Array:
    """Return the stability of each group over the failures that it was fitted to, those not `held_out` (m,); (g,)."""
    usable = np.flatnonzero(held_out == 0)
    members = [np.searchsorted(usable, np.sort(group.members)) for group in grouping.groups]
    return stability(failures.take(usable), members, config, bootstraps=bootstraps, check=check)


def _drawn(source: Array, generator: np.random.Generator) -> Array:
    """Return positions of the failures of sources that are drawn with replacement."""
    sources = np.unique(source)
    few = max(1, round(len(sources) * min(1.0, _MOST_FAILURES / len(source))))
    return np.flatnonzero(np.isin(source, generator.choice(sources, few)))


def _most_alike(members: Array, labels: Array, sizes: Array) -> float:
    """Return the largest Jaccard index of members with the failures of one label."""
    found, shared = np.unique(labels[members], return_counts=True)
    return float((shared / (len(members) + sizes[found] - shared)).max())
