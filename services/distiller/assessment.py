"""Assessment of groups of failures, and storage of those that are regions.

The served classifier tests the groups, and real images describe them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from defuse import names
from defuse.v1 import region_pb2, run_pb2

from services.arrays import Array
from services.distiller import findings, records
from services.distiller.findings import Finding, RunEvidence
from services.distiller.grouping import Group, GroupedFailures, Grouping, GroupingConfig, Kind
from services.distiller.records import read_surroundings
from services.latent_space.autoencoder import read_decoder, read_label_model
from services.latent_space.label_model import draw_carrying
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from services.triton.client import Classifier, InferenceClient

_KINDS: dict[int, Kind] = {
    # Runs from before there was a choice.
    run_pb2.MixtureConfig.KIND_UNSPECIFIED: "error_aware",
    run_pb2.MixtureConfig.KIND_ERROR_AWARE: "error_aware",
    run_pb2.MixtureConfig.KIND_PLAIN: "plain",
}
# Separates the draws of fresh decodes from others of the same seed.
_STREAM = 2


@dataclass(frozen=True, kw_only=True)
class DistillerDependencies:
    """The artifact store and the inference client that the distiller uses."""

    store: ArtifactStore
    inference: InferenceClient


class RegionAssessor:
    """Decides which groups of failures are regions.

    The groups are those of a run or of a region, and `arrays` has the failures.
    """

    def __init__(
        self, dependencies: DistillerDependencies, run: run_pb2.Run, arrays: dict[str, Array], job: Job
    ) -> None:
        self._dependencies, self._run, self._arrays, self._job = dependencies, run, arrays, job
        self._model = Catalog(dependencies.store).model(run.config.model)
        self.failures = GroupedFailures(**{field.name: arrays[field.name] for field in fields(GroupedFailures)})

    def config(self) -> GroupingConfig:
        """Return the grouping configuration of the run."""
        config = self._run.config.mixture
        return GroupingConfig(
            kind=_KINDS[config.kind],
            classes=len(self._model.classes),
            sd_agg=self._dependencies.store.read_arrays(keys.sources(self._run.name))["sd_agg"],
            max_components=config.max_components,
            min_support=config.min_support,
            seed=self._run.config.seed,
        )

    def findings(self, groups: Sequence[Group], stable: Array, *, shard_count: int) -> list[Finding]:
        """Test groups, and return the regions among them by descending score.

        `stable` (g,) is the stability of each group. The served classifier classifies fresh decodes of the groups.
        """
        if not groups:
            return []
        run, mixture = self._run, self._run.config.mixture
        classifier = self._dependencies.inference.classifier(self._model, version=run.config.model_version)
        report_progress(self._job, 0.6, "classifying training images nearby")
        around = read_surroundings(self._dependencies.store, run, classifier, shard_count)
        decodes = _Decodes(self._dependencies, run, classifier, self.failures, len(groups), self._job)
        return findings.find_regions(
            groups,
            stable,
            RunEvidence(failures=self.failures, around=around, classes=list(self._model.classes)),
            errors=decodes.errors,
            controls=mixture.fresh_decodes,
            false_discovery_rate=mixture.false_discovery_rate,
        )

    def stored(self, found: Sequence[Finding], *, prefix: str, total: int) -> list[region_pb2.Region]:
        """Store the arrays of regions and return their records.

        Regions are named by prefix and rank. `total` is the number of failures in all.
        """
        if not found:
            return []
        store, regions = self._dependencies.store, []
        pictures = records.PictureRenderer.read(store, self._run)
        for rank, finding in enumerate(found, start=1):
            name = names.region(names.last(self._run.name), f"{prefix}{rank}")
            store.create_arrays(keys.region_arrays(name), pictures.arrays(finding, self._arrays))
            regions.append(records.region_record(name, finding, total, self._arrays, list(self._model.classes)))
        return regions


class _Decodes:
    """Decodes fresh latents of groups, and classifies them through Triton."""

    def __init__(
        self,
        dependencies: DistillerDependencies,
        run: run_pb2.Run,
        classifier: Classifier,
        failures: GroupedFailures,
        groups: int,
        job: Job,
    ) -> None:
        self._decode = read_decoder(dependencies.store, run.config)
        self._label_model = read_label_model(dependencies.store, run.config)
        self._run, self._classifier, self._failures, self._groups, self._job = run, classifier, failures, groups, job

    def errors(self, number: int, group: Group) -> tuple[int, int]:
        """Return the numbers of misclassified and of all decodes of a group."""
        self._job.check_cancelled()
        report_progress(self._job, 0.7 + 0.3 * number / self._groups, f"testing group {number + 1} of {self._groups}")
        z, label = self._drawn(group, np.random.default_rng([self._run.config.seed, _STREAM, number]))
        if not len(z):
            return 0, 0
        answers = self._classifier.classify(self._decode(z)).argmax(axis=1)
        return int((answers != label).sum()), len(z)

    def _drawn(self, group: Group, generator: np.random.Generator) -> tuple[Array, Array]:
        """Return latents (n, d) of a group, and their labels (n,).

        The latents are drawn from the group's Gaussian. They are kept when the label model gives their label at least
        the probability that the run's validity requires. Fewer than `fresh_decodes` remain when hardly any draw is
        kept.
        """
        least = self._run.config.validity.min_label_probability

        def carries(z: Array) -> Array:
            label = findings.label_of(z, group, self._failures)
            return np.asarray(self._label_model(z)[np.arange(len(z)), label] >= least)

        wanted = self._run.config.mixture.fresh_decodes
        z = draw_carrying(lambda size: group.gaussian.sample(size, generator), wanted, carries)
        return z, findings.label_of(z, group, self._failures)


def counts(grouping: Grouping, found: Sequence[Finding]) -> region_pb2.GroupCounts:
    """Return the numbers of failures and groups by outcome."""
    inside = sum(len(finding.group.members) for finding in found)
    return region_pb2.GroupCounts(
        failures=grouping.failures,
        failures_without_region=grouping.failures - inside,
        groups=grouping.group_count,
        below_support=grouping.below_support,
        merged=grouping.merged,
        not_worse_than_control=len(grouping.groups) - len(found),
    )


def report_progress(job: Job, fraction: float, note: str) -> None:
    """Report the progress of a distillation."""
    job.progress(fraction, note, state=run_pb2.Run.STATE_DISTILLING)
