"""The rounds of a search: stored results, and each round's plan.

A plan depends on the results of all earlier rounds. Two workers may search one shard at
the same time, when one of them lost its claim, and margins differ by rounding. Each
result is therefore one artifact that is created once: the second worker reads the
results of the first.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from defuse.v1 import run_pb2

from services.arrays import Array
from services.generator import allocation
from services.generator.allocation import DirectionSums, SourceStatistics
from services.generator.perturbations import RoundAllocation
from services.generator.preflight import SourceMargins
from services.generator.run_context import RunContext, is_adaptive, shard_slice
from services.generator.search import ShardResult
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.safetensors import join_groups, select_group


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """The results of one shard in one round."""

    failures: Mapping[str, Array]
    # Over the sources of the shard, (n,): the fields of `SourceStatistics`.
    tally: Mapping[str, Array]
    sums: DirectionSums
    counts: run_pb2.SearchCounts


def create_margins(store: ArtifactStore, run: str, shard: int, examined: SourceMargins, mu: Array) -> None:
    """Store the margins of a shard's sources, and their posterior means (n, d)."""
    store.create_arrays(keys.shard_sources(run, shard), {"mu": mu, **examined.arrays()})


def read_margins(store: ArtifactStore, run: str, shard: int) -> tuple[SourceMargins, Array]:
    """Return the margins of a shard's sources, and their posterior means (n, d)."""
    arrays = store.read_arrays(keys.shard_sources(run, shard))
    mu = arrays.pop("mu")
    return SourceMargins(**arrays), mu


def create_result(store: ArtifactStore, run: str, round_: int, shard: int, found: ShardResult, sources: Array) -> None:
    """Store the results of a shard in one round.

    `sources` (n,) are those of the shard, ascending.
    """
    by_source = np.bincount(np.searchsorted(sources, found.failures.source), minlength=len(sources))
    tally = {
        "decodes": found.decodes,
        "failures": by_source.astype(np.int32),
        "margin_sum": found.margin_sum,
        "margin_square_sum": found.margin_square_sum,
    }
    counts = {name: np.array([count]) for name, count in asdict(found.counts).items()}
    arrays = join_groups(failures=found.failures.arrays(), tally=tally, sums=found.directions.arrays(), counts=counts)
    store.create_arrays(keys.shard_result(run, round_, shard), arrays)


def read_result(store: ArtifactStore, run: str, round_: int, shard: int) -> StoredResult:
    """Return the results of a shard in one round."""
    arrays = store.read_arrays(keys.shard_result(run, round_, shard))
    return StoredResult(
        failures=select_group(arrays, "failures"),
        tally=select_group(arrays, "tally"),
        sums=DirectionSums(**select_group(arrays, "sums")),
        counts=run_pb2.SearchCounts(**{name: count.item() for name, count in select_group(arrays, "counts").items()}),
    )


# These statistics add up over rounds; those of the unperturbed sources do not change.
_SUMMED = ("decodes", "failures", "margin_sum", "margin_square_sum")


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """The plan of one round, and the data behind it.

    Arrays are over its n sources.
    """

    # (n,) perturbations to decode
    decodes: Array
    # (k, d)
    directions: Array
    tally: SourceStatistics
    sums: DirectionSums
    # (k, k) failures so far by true and predicted label
    confusions: Array

    def arrays(self) -> dict[str, Array]:
        plan = {"decodes": self.decodes, "directions": self.directions, "confusions": self.confusions}
        return join_groups(plan=plan, tally=self.tally.arrays(), sums=self.sums.arrays())

    @classmethod
    def of(cls, arrays: dict[str, Array]) -> "RoundPlan":
        """Return the plan that the method `arrays` has converted to arrays."""
        tally, sums = SourceStatistics(**select_group(arrays, "tally")), DirectionSums(**select_group(arrays, "sums"))
        return cls(tally=tally, sums=sums, **select_group(arrays, "plan"))


def make_plan(context: RunContext, run: run_pb2.Run, round_: int, shard_count: int) -> RoundPlan:
    """Return the plan of a round, from the previous one's stored results."""
    tally, sums, confusions = _totals(context, run, round_, shard_count)
    wanted = run.config.search
    budget_left = wanted.draws_per_source * int(tally.searchable.sum()) - int(tally.decodes.sum())
    decodes = allocation.allocate(
        tally,
        decodes=budget_left // (wanted.rounds - round_),
        limit=wanted.max_failures_per_source,
        uniform_decodes=wanted.draws_per_source,
    )
    return RoundPlan(decodes=decodes, directions=sums.directions(), tally=tally, sums=sums, confusions=confusions)


def first_allocation(run: run_pb2.Run, examined: SourceMargins) -> RoundAllocation:
    """Return the first round's allocation for a shard, which prefers no source."""
    adaptive = is_adaptive(run)
    return RoundAllocation(
        round_=0,
        decodes=allocation.uniform_allocation(
            examined.searchable, 1 if adaptive else run.config.search.draws_per_source
        ),
        found=np.zeros(len(examined.searchable), np.int32),
        reconstruction_margin=examined.reconstruction_margin,
        screen=adaptive,
    )


def planned_allocation(plan: RoundPlan, run: run_pb2.Run, round_: int, shard: int) -> RoundAllocation:
    """Return a plan's allocation for one shard."""
    part = shard_slice(run, shard)
    return RoundAllocation(
        round_=round_,
        decodes=np.array(plan.decodes[part]),
        found=np.array(plan.tally.failures[part]),
        reconstruction_margin=np.array(plan.tally.reconstruction_margin[part]),
        directions=np.array(plan.directions),
        screen=True,
    )


def _totals(
    context: RunContext, run: run_pb2.Run, round_: int, shard_count: int
) -> tuple[SourceStatistics, DirectionSums, Array]:
    """Return the sums of all earlier rounds by source, class and confusion.

    Sources are in their order.
    """
    latest, sums, confusions = _round_totals(context, run, round_ - 1, shard_count)
    if round_ == 1:
        known = _first_round(context, run, shard_count, latest)
    else:
        before = RoundPlan.of(context.store.read_arrays(keys.plan(run.name, round_ - 1)))
        known = {name: array for name, array in before.tally.arrays().items() if name not in _SUMMED}
        latest = {name: getattr(before.tally, name) + latest[name] for name in _SUMMED}
        sums, confusions = [before.sums, *sums], before.confusions + confusions
    labels = context.images(run, keys.SEARCHED_SPLIT).labels[context.prepared(run).index]
    alike = {"confusion_failures": confusions[labels, known["runner_up"]]}
    return SourceStatistics(**latest, **known | alike), sum(sums[1:], start=sums[0]), confusions


def _first_round(context: RunContext, run: run_pb2.Run, shard_count: int, latest: dict[str, Array]) -> dict[str, Array]:
    """Return the statistics that only the first round determines."""
    examined = [read_margins(context.store, run.name, shard)[0] for shard in range(shard_count)]
    return {
        "searchable": np.concatenate([part.searchable for part in examined]),
        "reconstruction_margin": np.concatenate([part.reconstruction_margin for part in examined]),
        "runner_up": np.concatenate([part.runner_up for part in examined]),
        "first_decodes": latest["decodes"],
        "first_failures": latest["failures"],
    }


def _round_totals(
    context: RunContext, run: run_pb2.Run, round_: int, shard_count: int
) -> tuple[dict[str, Array], list[DirectionSums], Array]:
    """Return the results of one round.

    They are statistics by source, sums by shard, and failures by true and predicted label (k, k).
    """
    classes = len(context.model(run).classes)
    confusions = np.zeros((classes, classes), np.int32)
    tallies, sums = [], []
    for shard in range(shard_count):
        found = read_result(context.store, run.name, round_, shard)
        tallies.append(found.tally)
        sums.append(found.sums)
        np.add.at(confusions, (found.failures["true_label"], found.failures["predicted_label"]), 1)
    tally = {name: np.concatenate([part[name] for part in tallies]) for name in _SUMMED}
    return tally, sums, confusions
