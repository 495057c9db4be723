"""The distiller's stage: collect a run's failures, group them, test and store the regions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from defuse import names
from defuse.v1 import model_pb2, region_pb2, run_pb2, work_pb2

from services.distiller import evidence, findings, records
from services.distiller.findings import Finding, Known
from services.distiller.gaussian import Array
from services.distiller.grouping import Failures, Group, Grouping, GroupingConfig, Kind, group
from services.distiller.stability import stability
from services.distiller.surroundings import read_failures, read_surroundings
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.autoencoder import read_decoder, read_label_model
from services.runtime.catalog import Catalog
from services.runtime.inference import Classifier, InferenceClient
from services.runtime.worker import Job

_KINDS: dict[int, Kind] = {
    # Of a run from before there was a choice.
    run_pb2.MixtureConfig.KIND_UNSPECIFIED: "error_aware",
    run_pb2.MixtureConfig.KIND_ERROR_AWARE: "error_aware",
    run_pb2.MixtureConfig.KIND_PLAIN: "plain",
}
# Sets the draws of fresh decodes apart from others of the same seed.
_STREAM = 2
# Latents that are drawn for each fresh decode, at most, until it still carries its label.
_MOST_DRAWS = 20


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
        # Created, as are the regions' arrays: another worker may do the same, and what is read once must stay.
        tools.store.create_bytes(key, _distill(tools, work, job).SerializeToString(deterministic=True))
    distillation = tools.store.read_message(key, region_pb2.Distillation)
    event = work_pb2.Event(subject=run.name)
    event.distilled.region_count = len(distillation.regions)
    event.distilled.counts.CopyFrom(distillation.counts)
    return event


def _distill(tools: Tools, work: work_pb2.DistillWork, job: Job) -> region_pb2.Distillation:
    run, model = work.run, Catalog(tools.store).model(work.run.config.model)
    arrays = read_failures(tools.store, work)
    failures = Failures(**{field.name: arrays[field.name] for field in fields(Failures)})
    _say(job, 0.05, f"grouping {len(failures)} failures")
    config = _config(run, model, tools.store)
    grouping = group(failures, arrays["held_out"], config, job.check_cancelled)
    if not grouping.groups:
        return _stored(tools.store, run, model, grouping, [], arrays)
    classifier = tools.inference.classifier(model, version=run.config.model_version)
    _say(job, 0.3, "asking about the training images nearby")
    around = read_surroundings(tools.store, run, classifier, work.shard_count)
    _say(job, 0.4, "grouping again what is drawn anew")
    stable = _stability(failures, arrays["held_out"], grouping, config, run.config.mixture.bootstraps, job)
    found = findings.find(
        grouping.groups,
        stable,
        Known(failures=failures, around=around, classes=list(model.classes)),
        errors=_Decodes(tools, run, classifier, failures, len(grouping.groups), job).errors,
        controls=run.config.mixture.fresh_decodes,
        false_discovery_rate=run.config.mixture.false_discovery_rate,
    )
    return _stored(tools.store, run, model, grouping, found, arrays)


def _config(run: run_pb2.Run, model: model_pb2.Model, store: ArtifactStore) -> GroupingConfig:
    config = run.config.mixture
    return GroupingConfig(
        kind=_KINDS[config.kind],
        classes=len(model.classes),
        sd_agg=store.read_arrays(catalog.sources(run.name))["sd_agg"],
        max_components=config.max_components,
        min_support=config.min_support,
        seed=run.config.seed,
    )


def _stability(
    failures: Failures, held_out: Array, grouping: Grouping, config: GroupingConfig, bootstraps: int, job: Job
) -> Array:
    """Return the stability of each group over bootstraps of the failures that it was found among."""
    usable = np.flatnonzero(held_out == 0)
    members = [np.searchsorted(usable, np.sort(group.members)) for group in grouping.groups]
    return stability(failures.take(usable), members, config, bootstraps=bootstraps, check=job.check_cancelled)


class _Decodes:
    """Fresh decodes of groups, through the served classifier."""

    def __init__(
        self, tools: Tools, run: run_pb2.Run, classifier: Classifier, failures: Failures, groups: int, job: Job
    ) -> None:
        self._decode = read_decoder(tools.store, run.config)
        self._believed = read_label_model(tools.store, run.config)
        self._run, self._classifier, self._failures, self._groups, self._job = run, classifier, failures, groups, job

    def errors(self, number: int, group: Group) -> tuple[int, int]:
        """Return how many decodes of a group are not read as their label, and how many there are."""
        self._job.check_cancelled()
        _say(self._job, 0.7 + 0.3 * number / self._groups, f"testing group {number + 1} of {self._groups}")
        z, label = self._drawn(group, np.random.default_rng([self._run.config.seed, _STREAM, number]))
        if not len(z):
            return 0, 0
        answers = self._classifier.classify(self._decode(z)).argmax(axis=1)
        return int((answers != label).sum()), len(z)

    def _drawn(self, group: Group, generator: np.random.Generator) -> tuple[Array, Array]:
        """Return latents (n, d) from a group's Gaussian and their labels (n,).

        Those that no longer carry their label, as the run's validity has it, are drawn again: fewer than were asked for
        are left where hardly any do.
        """
        wanted = self._run.config.mixture.fresh_decodes
        z = group.gaussian.sample(_MOST_DRAWS * wanted, generator)
        label = evidence.label_of(z, group, self._failures)
        carried = self._believed(z)[np.arange(len(z)), label]
        kept = np.flatnonzero(carried >= self._run.config.validity.min_label_probability)[:wanted]
        return z[kept], label[kept]


def _stored(
    store: ArtifactStore,
    run: run_pb2.Run,
    model: model_pb2.Model,
    grouping: Grouping,
    found: Sequence[Finding],
    failures: dict[str, Array],
) -> region_pb2.Distillation:
    """Store the arrays of every region; return the record of all."""
    regions = []
    pictures = records.Pictures.read(store, run)
    for rank, finding in enumerate(found, start=1):
        name = names.region(names.last(run.name), f"r{rank}")
        store.create_arrays(catalog.region_arrays(name), pictures.arrays(finding, failures))
        regions.append(records.region(name, finding, grouping.failures, failures, list(model.classes)))
    inside = sum(len(finding.group.members) for finding in found)
    counts = region_pb2.GroupCounts(
        failures=grouping.failures,
        failures_without_region=grouping.failures - inside,
        groups=grouping.found,
        below_support=grouping.below_support,
        merged=grouping.merged,
        not_worse_than_control=len(grouping.groups) - len(found),
    )
    return region_pb2.Distillation(run=run.name, regions=regions, counts=counts)


def _say(job: Job, fraction: float, note: str) -> None:
    job.progress(fraction, note, state=run_pb2.Run.STATE_DISTILLING)
