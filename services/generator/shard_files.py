"""What is stored of a shard: how its sources are read, and what each round gave.

Two workers may search one shard at the same time, when one of them slept through its claim, and margins differ by
rounding. So each of the two is one artifact that is created once: who comes second reads what the first one found.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from defuse.v1 import run_pb2

from services.arrays import Array
from services.generator.budget import DirectionSums
from services.generator.examination import Examination
from services.generator.search import ShardResult
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import group, joined


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """What one shard gave in one round."""

    failures: Mapping[str, Array]
    # Over the sources of the shard, (n,): what budget.Tally is made of.
    tally: Mapping[str, Array]
    sums: DirectionSums
    counts: run_pb2.SearchCounts


def create_examination(store: ArtifactStore, run: str, shard: int, examined: Examination, mu: Array) -> None:
    """Store how the classifier reads the sources of a shard, and their posterior means (n, d)."""
    store.create_arrays(keys.shard_sources(run, shard), {"mu": mu, **examined.arrays()})


def read_examination(store: ArtifactStore, run: str, shard: int) -> tuple[Examination, Array]:
    """Return how the classifier reads the sources of a shard, and their posterior means (n, d)."""
    arrays = store.read_arrays(keys.shard_sources(run, shard))
    mu = arrays.pop("mu")
    return Examination(**arrays), mu


def create_result(store: ArtifactStore, run: str, round_: int, shard: int, found: ShardResult, sources: Array) -> None:
    """Store what a shard gave in one round; `sources` (n,) are those of the shard, ascending."""
    by_source = np.bincount(np.searchsorted(sources, found.failures.source), minlength=len(sources))
    tally = {
        "decodes": found.decodes,
        "failures": by_source.astype(np.int32),
        "margin_sum": found.margin_sum,
        "margin_square_sum": found.margin_square_sum,
    }
    counts = {name: np.array([count]) for name, count in asdict(found.counts).items()}
    arrays = joined(failures=found.failures.arrays(), tally=tally, sums=found.directions.arrays(), counts=counts)
    store.create_arrays(keys.shard_result(run, round_, shard), arrays)


def read_result(store: ArtifactStore, run: str, round_: int, shard: int) -> StoredResult:
    """Return what a shard gave in one round."""
    arrays = store.read_arrays(keys.shard_result(run, round_, shard))
    return StoredResult(
        failures=group(arrays, "failures"),
        tally=group(arrays, "tally"),
        sums=DirectionSums(**group(arrays, "sums")),
        counts=run_pb2.SearchCounts(**{name: count.item() for name, count in group(arrays, "counts").items()}),
    )
