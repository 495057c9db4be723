"""The distiller's stage on a finished search."""

import time
from dataclasses import dataclass

from defuse.v1 import region_pb2, run_pb2, work_pb2

from benchmarks.stand import Search, Stand
from services.distiller import assessment, worker
from services.runtime.worker import Job
from services.storage import keys


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """Regions, largest score first, and the seconds that they took."""

    regions: list[region_pb2.Region]
    counts: region_pb2.GroupCounts
    seconds: float

    def purity(self) -> float:
        """Return the share of the regions' failures that are of the most frequent confusion of their region."""
        total = sum(region.size for region in self.regions)
        return round(sum(region.profile[0].count for region in self.regions) / total, 3) if total else 0.0


def distilled(stand: Stand, search: Search, *, kind: str) -> Distilled:
    """Distill a search as if its run had been created with this kind of mixture."""
    run = run_pb2.Run()
    run.CopyFrom(search.run)
    run.config.mixture.kind = run_pb2.MixtureConfig.Kind.Value(f"KIND_{kind.upper()}")
    _forget(stand, run.name)
    dependencies = assessment.DistillerDependencies(store=stand.store, inference=stand.inference)
    work = work_pb2.DistillWork(run=run, shard_count=search.shards, round_count=search.rounds_done)
    begin = time.perf_counter()
    worker.distill(dependencies, work, Job(run.name, lambda _: None))
    seconds = time.perf_counter() - begin
    found = stand.store.read_message(keys.distillation(run.name), region_pb2.Distillation)
    return Distilled(regions=list(found.regions), counts=found.counts, seconds=seconds)


def _forget(stand: Stand, run: str) -> None:
    """Remove the regions of another kind."""
    key = keys.distillation(run)
    if stand.store.exists(key):
        for region in stand.store.read_message(key, region_pb2.Distillation).regions:
            stand.store.remove(keys.region_arrays(region.name))
        stand.store.remove(key)
