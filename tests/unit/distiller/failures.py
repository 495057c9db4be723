"""Failures whose groups are known."""

from dataclasses import dataclass

import numpy as np

from services.arrays import Array
from services.distiller.grouping import GroupedFailures


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A planted group: a confusion at a place."""

    confusion: tuple[int, int]
    centre: tuple[float, float]
    size: int


# Two confusions lie at the same place; one confusion has two places; the last has too few failures.
PLANTED = (
    Cluster(confusion=(0, 1), centre=(-4, 0), size=120),
    Cluster(confusion=(0, 1), centre=(4, 0), size=80),
    Cluster(confusion=(2, 1), centre=(-4, 0), size=60),
    Cluster(confusion=(1, 2), centre=(0, 5), size=8),
)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Failures in shuffled order, which of them are held out, and the cluster of each."""

    failures: GroupedFailures
    held_out: Array
    cluster: Array


def planted(clusters: tuple[Cluster, ...] = PLANTED, held_out_share: float = 0.25, *, per_source: int = 2) -> Truth:
    """Plant clusters of sd 0.4, `per_source` failures of each source."""
    random = np.random.default_rng(0)
    cluster = random.permutation(np.repeat(np.arange(len(clusters)), [one.size for one in clusters]))
    centres = np.array([one.centre for one in clusters])
    confusions = np.array([one.confusion for one in clusters])
    source = np.empty(len(cluster), np.int64)
    for number in range(len(clusters)):
        here = np.flatnonzero(cluster == number)
        source[here] = 1000 * number + np.arange(len(here)) // per_source
    failures = GroupedFailures(
        latent=(centres[cluster] + 0.4 * random.standard_normal((len(cluster), 2))).astype(np.float32),
        true_label=confusions[cluster, 0],
        predicted_label=confusions[cluster, 1],
        source=source,
    )
    held_out = (random.random(len(cluster)) < held_out_share).astype(np.uint8)
    return Truth(failures=failures, held_out=held_out, cluster=cluster)
