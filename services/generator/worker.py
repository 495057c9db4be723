"""The stages of the search.

`identify` searches one shard in one round, and `plan` allocates the next round.
"""

import numpy as np
from defuse.v1 import work_pb2

from services.arrays import Array
from services.generator import rounds
from services.generator.failures import SearchCounters
from services.generator.perturbations import RoundAllocation
from services.generator.preflight import SourceMargins, measure_margins
from services.generator.rounds import RoundPlan, create_margins, create_result, read_margins, read_result
from services.generator.run_context import RunContext, noise_model_of, real_images, shard_slice
from services.generator.search import ShardResult, search
from services.runtime import telemetry
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import is_residual


def identify(context: RunContext, work: work_pb2.IdentifyWork, job: Job) -> work_pb2.Event:
    """Search one shard and store its results.

    A shard whose results are stored is not searched again.
    """
    run, round_, shard = work.run, work.round, work.shard
    if not context.store.exists(keys.shard_result(run.name, round_, shard)):
        found = _search_shard(context, work, job)
        create_result(
            context.store, run.name, round_, shard, found, context.prepared(run).index[shard_slice(run, shard)]
        )
    event = work_pb2.Event(subject=run.name)
    event.shard_identified.shard = shard
    event.shard_identified.round = round_
    event.shard_identified.counts.CopyFrom(read_result(context.store, run.name, round_, shard).counts)
    return event


def plan(context: RunContext, work: work_pb2.PlanWork, job: Job) -> work_pb2.Event:
    """Plan a round and store the plan.

    A plan that is stored is not made again.
    """
    job.check_cancelled()
    run, key = work.run, keys.plan(work.run.name, work.round)
    if not context.store.exists(key):
        # Created once: concurrent planners must not give the shards of a round different allocations.
        context.store.create_arrays(key, rounds.make_plan(context, run, work.round, work.shard_count).arrays())
    event = work_pb2.Event(subject=run.name)
    event.round_planned.round = work.round
    event.round_planned.decodes = int(context.store.map_arrays(key)["plan.decodes"].sum())
    return event


def _search_shard(context: RunContext, work: work_pb2.IdentifyWork, job: Job) -> ShardResult:
    run = work.run
    context.use_all_threads()
    examined, mu = _examined(context, work, job)
    result = search(
        context.sources(run, work.shard, mu),
        _round_allocation(context, work, examined),
        noise_model_of(run),
        context.models(run, context.prepared(run).sd_agg),
        context.checks(run),
        classes=len(context.model(run).classes),
        check=job.check_cancelled,
    )
    if work.round == 0:
        _count_sources(result.counts, examined, reconstructed=not is_residual(run.config))
    telemetry.DECODES.inc(result.counts.decodes)
    telemetry.FAILURES.inc(result.counts.failures)
    return result


def _examined(context: RunContext, work: work_pb2.IdentifyWork, job: Job) -> tuple[SourceMargins, Array]:
    """Return the margins of the shard's sources, and their latents.

    They are measured once, in the first round.
    """
    run = work.run
    if not context.store.exists(keys.shard_sources(run.name, work.shard)):
        searched = context.images(run, keys.SEARCHED_SPLIT)
        index = np.array(context.prepared(run).index[shard_slice(run, work.shard)])
        images = real_images(searched, index)
        mu, _ = context.codec(run.config).encode_stored(images)
        examined = measure_margins(
            images,
            searched.labels[index],
            mu,
            context.models(run, context.prepared(run).sd_agg),
            batch_size=run.config.search.batch_size,
            check=job.check_cancelled,
        )
        create_margins(context.store, run.name, work.shard, examined, mu)
    return read_margins(context.store, run.name, work.shard)


def _round_allocation(context: RunContext, work: work_pb2.IdentifyWork, examined: SourceMargins) -> RoundAllocation:
    if work.round == 0:
        return rounds.first_allocation(work.run, examined)
    stored = RoundPlan.of(context.store.map_arrays(keys.plan(work.run.name, work.round)))
    return rounds.planned_allocation(stored, work.run, work.round, work.shard)


def _count_sources(counts: SearchCounters, examined: SourceMargins, *, reconstructed: bool) -> None:
    """Count the sources left out, and the calls for all unperturbed sources."""
    counts.sources_wrong_on_image = int((~examined.right_on_image).sum())
    counts.sources_wrong_on_reconstruction = int((examined.right_on_image & ~examined.searchable).sum())
    counts.encodes += counts.sources
    counts.classifications += counts.sources
    if reconstructed:
        counts.decodes_again += counts.sources
        counts.classifications += counts.sources
