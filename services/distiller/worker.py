"""The distiller's stage: collect a run's failures, group them, test and store the regions."""

from defuse.v1 import region_pb2, work_pb2

from services.distiller.assessing import Assessor, Tools, counts, say
from services.distiller.grouping import group
from services.distiller.stability import stability_of
from services.distiller.surroundings import read_failures
from services.runtime.worker import Job
from services.storage import keys

__all__ = ["Tools", "distill"]


def distill(tools: Tools, work: work_pb2.DistillWork, job: Job) -> work_pb2.Event:
    """Turn the failures of all shards into regions; a distillation that is stored already is not made again."""
    run = work.run
    key = keys.distillation(run.name)
    if not tools.store.exists(key):
        # Created, as are the regions' arrays: another worker may do the same, and what is read once must stay.
        tools.store.create_bytes(key, _distill(tools, work, job).SerializeToString(deterministic=True))
    distillation = tools.store.read_message(key, region_pb2.Distillation)
    event = work_pb2.Event(subject=run.name)
    event.distilled.region_count = len(distillation.regions)
    event.distilled.counts.CopyFrom(distillation.counts)
    return event


def _distill(tools: Tools, work: work_pb2.DistillWork, job: Job) -> region_pb2.Distillation:
    arrays = read_failures(tools.store, work)
    assessor = Assessor(tools, work.run, arrays, job)
    say(job, 0.05, f"grouping {len(assessor.failures)} failures")
    config = assessor.config()
    grouping = group(assessor.failures, arrays["held_out"], config, job.check_cancelled)
    say(job, 0.3, "grouping again what is drawn anew")
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
