"""The stages of the distiller: runs into regions, and regions into parts."""

from collections.abc import Sequence

from defuse import names
from defuse.errors import NotReady
from defuse.v1 import region_pb2, work_pb2

from services.distiller.assessment import DistillerDependencies, RegionAssessor, counts, report_progress
from services.distiller.grouping import group_failures, stability_of
from services.distiller.records import read_failures, shard_count
from services.distiller.region_split import split_group
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import Catalog

__all__ = ["DistillerDependencies", "distill"]


def distill(dependencies: DistillerDependencies, work: work_pb2.DistillWork, job: Job) -> work_pb2.Event:
    """Group the failures of all shards into regions.

    A distillation that is already stored is not computed again.
    """
    run = work.run
    key = keys.distillation(run.name)
    if not dependencies.store.exists(key):
        # Created once, as are the regions' arrays: a concurrent worker must not change what was read.
        dependencies.store.create_bytes(key, _distill(dependencies, work, job).SerializeToString(deterministic=True))
    distillation = dependencies.store.read_message(key, region_pb2.Distillation)
    event = work_pb2.Event(subject=run.name)
    event.distilled.region_count = len(distillation.regions)
    event.distilled.counts.CopyFrom(distillation.counts)
    return event


def _distill(dependencies: DistillerDependencies, work: work_pb2.DistillWork, job: Job) -> region_pb2.Distillation:
    arrays = read_failures(dependencies.store, work)
    assessor = RegionAssessor(dependencies, work.run, arrays, job)
    report_progress(job, 0.05, f"grouping {len(assessor.failures)} failures")
    config = assessor.config()
    grouping = group_failures(assessor.failures, arrays["held_out"], config, job.check_cancelled)
    report_progress(job, 0.3, "grouping bootstrap samples")
    stable = stability_of(
        grouping,
        assessor.failures,
        arrays["held_out"],
        config,
        bootstraps=work.run.config.mixture.bootstraps,
        check=job.check_cancelled,
    )
    found = assessor.findings(grouping.groups, stable, shard_count=work.shard_count)
    regions = assessor.stored(found, prefix="r", total=grouping.failures)
    return region_pb2.Distillation(run=work.run.name, regions=regions, counts=counts(grouping, found))


def split_region(dependencies: DistillerDependencies, name: str) -> Sequence[region_pb2.Region]:
    """Return the parts of a region, largest score first.

    A split that is already stored is not computed again. Raises NotFound for an unknown region, and NotReady when it
    has no distinct parts that are worse than their controls.
    """
    region, key = Catalog(dependencies.store).region(name), keys.region_parts(name)
    if not dependencies.store.exists(key):
        # Created once, since two annotators may ask concurrently.
        dependencies.store.create_bytes(key, _split(dependencies, region).SerializeToString(deterministic=True))
    return dependencies.store.read_message(key, region_pb2.Distillation).regions


def _split(dependencies: DistillerDependencies, region: region_pb2.Region) -> region_pb2.Distillation:
    reader, region_id = Catalog(dependencies.store), names.last(region.name)
    run = reader.run(names.parent(region.name))
    [arrays] = reader.region_failures(run.name, [region.name])
    # The annotator waits for the answer itself, so there is no progress to report.
    assessor = RegionAssessor(dependencies, run, arrays, Job(region.name, lambda _: None))
    parts = split_group(
        assessor.failures,
        arrays["held_out"],
        arrays["margin"],
        assessor.config(),
        bootstraps=run.config.mixture.bootstraps,
    )
    if parts is None:
        raise NotReady(
            f"region {region_id!r} has no distinct parts, neither by the latents of its {region.size} failures nor by "
            "the classifier's margins; annotate it as invalid or unsure",
            reason="NOT_SEPARABLE",
        )
    found = assessor.findings(parts.grouping.groups, parts.stability, shard_count=shard_count(dependencies.store, run))
    if not found:
        raise NotReady(
            f"region {region_id!r} has {len(parts.grouping.groups)} parts, but none is misread more often than the "
            "real images around it; call it invalid or unsure",
            reason="NO_PART_WORSE",
        )
    total = dependencies.store.read_message(keys.distillation(run.name), region_pb2.Distillation).counts.failures
    return region_pb2.Distillation(
        run=run.name,
        regions=assessor.stored(found, prefix=f"{region_id}-", total=total),
        counts=counts(parts.grouping, found),
    )
