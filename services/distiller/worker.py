"""The distiller's stage: collect a run's failures, group them, measure and store the regions."""

from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.v1 import model_pb2, region_pb2, run_pb2, tensor_pb2, work_pb2

from services.distiller.components import Array
from services.distiller.regions import FoundRegion, Grouping, exemplars, find_regions, sample
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog
from services.runtime.decoder import read_decoder
from services.runtime.inference import InferenceClient, as_stored
from services.runtime.intervals import estimate
from services.runtime.worker import Job

EXEMPLARS = 16


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the stage reads from and asks."""

    store: ArtifactStore
    inference: InferenceClient


def distill(tools: Tools, work: work_pb2.DistillWork, job: Job) -> work_pb2.Event:
    """Turn the failures of all shards into regions; a distillation that is stored already is not made again."""
    run = work.run
    key = catalog.distillation(run.name)
    if not tools.store.exists(key):
        tools.store.write_message(key, _distill(tools, work, job))
    distillation = tools.store.read_message(key, region_pb2.Distillation)
    event = work_pb2.Event(subject=run.name)
    event.distilled.region_count = len(distillation.regions)
    return event


def _distill(tools: Tools, work: work_pb2.DistillWork, job: Job) -> region_pb2.Distillation:
    run = work.run
    failures = _collect(tools.store, work)
    job.progress(0.1, f"grouping {len(failures['source'])} failures", state=run_pb2.Run.STATE_DISTILLING)
    grouping = _group(run, failures)
    model = Catalog(tools.store).model(run.config.model)
    regions = []
    for rank, found in enumerate(grouping.regions, start=1):
        job.check_cancelled()
        job.progress(
            0.2 + 0.8 * rank / len(grouping.regions),
            f"measuring region {rank} of {len(grouping.regions)}",
            state=run_pb2.Run.STATE_DISTILLING,
        )
        name = names.region(names.last(run.name), f"r{rank}")
        regions.append(_region(name, found, model, _error_rate(tools, run, model, found, seed=rank)))
        _store_arrays(tools, run, name, found, failures)
    return region_pb2.Distillation(
        run=run.name,
        regions=regions,
        failures=grouping.failures,
        failures_without_region=grouping.failures_without_region,
        components=grouping.components,
    )


def _collect(store: ArtifactStore, work: work_pb2.DistillWork) -> dict[str, Array]:
    """Return the failures of a run as arrays, in the order of their sources, rounds and draws."""
    reader = Catalog(store)
    shards = [
        reader.failures(work.run.name, round_, shard)
        for round_ in range(work.round_count)
        for shard in range(work.shard_count)
    ]
    failures = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.lexsort((failures["draw"], failures["round"], failures["source"]))
    return {name: array[order] for name, array in failures.items()}


def _group(run: run_pb2.Run, failures: dict[str, Array]) -> Grouping:
    config = run.config.mixture
    return find_regions(
        latent=failures["latent"],
        true_label=failures["true_label"],
        predicted_label=failures["predicted_label"],
        held_out=failures["held_out"],
        max_components=config.max_components,
        min_support=config.min_support,
        seed=run.config.seed,
    )


def _region(
    name: str, found: FoundRegion, model: model_pb2.Model, error_rate: tensor_pb2.Estimate
) -> region_pb2.Region:
    true, predicted = model.classes[found.true_label], model.classes[found.predicted_label]
    count = len(found.members)
    return region_pb2.Region(
        name=name,
        weight=found.weight,
        size=count,
        held_out_size=len(found.held_out_members),
        true_label=true,
        predicted_label=predicted,
        profile=[region_pb2.Confusion(true_label=true, predicted_label=predicted, count=count)],
        error_rate=error_rate,
        suggested_label=true,
        suggestion_reason=f"all {count} failures are small steps from real images labelled {true!r}",
    )


def _error_rate(
    tools: Tools, run: run_pb2.Run, model: model_pb2.Model, found: FoundRegion, *, seed: int
) -> tensor_pb2.Estimate:
    """Measure how often the served classifier is wrong on fresh decodes from the region's Gaussian."""
    generator = np.random.default_rng([run.config.seed, seed])
    z = sample(found.mean, found.covariance, run.config.mixture.fresh_decodes, generator)
    classifier = tools.inference.classifier(model, version=run.config.model_version)
    logits = classifier.classify(read_decoder(tools.store, run.config)(z))
    return estimate(int((logits.argmax(axis=1) != found.true_label).sum()), len(z))


def _store_arrays(tools: Tools, run: run_pb2.Run, name: str, found: FoundRegion, failures: dict[str, Array]) -> None:
    shown = exemplars(found.members, EXEMPLARS)
    real = tools.store.map_arrays(catalog.split(run.config.dataset, "val"))["x"]
    arrays = {
        "mean": found.mean,
        "covariance": found.covariance,
        "latent": failures["latent"][found.members],
        "source": failures["source"][found.members],
        "held_out_latent": failures["latent"][found.held_out_members],
        "held_out_source": failures["source"][found.held_out_members],
        "exemplars": as_stored(read_decoder(tools.store, run.config)(failures["latent"][shown])),
        "exemplar_sources": real[failures["source"][shown]],
    }
    tools.store.write_arrays(catalog.region_arrays(name), arrays)
