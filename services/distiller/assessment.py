"""Assessment of groups of failures, and storage of those that are regions.

The served classifier tests the groups, and real images describe them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from defuse import names
from defuse.v1 import region_pb2, run_pb2

from services.arrays import Array
from services.distiller import findings, records
from services.distiller.findings import Finding, FreshErrors, RunEvidence
from services.distiller.grouping import Group, GroupedFailures, Grouping, GroupingConfig, Kind
from services.distiller.records import read_surroundings
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RegionShape, RunImages
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
# Separates the draws of fresh images from others of the same seed.
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
        self._images = RunImages(dependencies.store, run)
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

        `stable` (g,) is the stability of each group. The served classifier classifies fresh images of the groups.
        """
        if not groups:
            return []
        run, mixture = self._run, self._run.config.mixture
        classifier = self._dependencies.inference.classifier(self._model, version=run.config.model_version)
        report_progress(self._job, 0.6, "classifying training images nearby")
        around = read_surroundings(self._dependencies.store, run, classifier, shard_count)
        fresh = _FreshImages(self._images, run, classifier, self.failures, len(groups), self._job)
        return findings.find_regions(
            groups,
            stable,
            RunEvidence(failures=self.failures, around=around, classes=list(self._model.classes)),
            errors=fresh.errors,
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
        pictures = records.PictureRenderer.read(store, self._run, self._images)
        for rank, finding in enumerate(found, start=1):
            name = names.region(names.last(self._run.name), f"{prefix}{rank}")
            store.create_arrays(keys.region_arrays(name), pictures.arrays(finding, self._arrays))
            regions.append(records.region_record(name, finding, total, self._arrays, list(self._model.classes)))
        return regions


class _FreshImages:
    """Draws fresh images of groups, and classifies them through Triton."""

    def __init__(
        self,
        images: RunImages,
        run: run_pb2.Run,
        classifier: Classifier,
        failures: GroupedFailures,
        groups: int,
        job: Job,
    ) -> None:
        self._images, self._run, self._classifier = images, run, classifier
        self._failures, self._groups, self._job = failures, groups, job

    def errors(self, number: int, group: Group) -> FreshErrors:
        """Count the misclassified ones among fresh images of a group.

        With the rendering `residual`, no two of them share a source, so that each is evidence of its own.
        """
        self._job.check_cancelled()
        report_progress(self._job, 0.7 + 0.3 * number / self._groups, f"testing group {number + 1} of {self._groups}")
        drawn = self._images.fresh(
            RegionShape(gaussian=group.gaussian, sources=self._failures.source[group.members]),
            partial(self._label_of, group),
            self._run.config.mixture.fresh_decodes,
            np.random.default_rng([self._run.config.seed, _STREAM, number]),
            one_of_each=True,
        )
        if not len(drawn):
            return FreshErrors(errors=0, source=drawn.source)
        answers = self._classifier.classify(self._images.render(drawn)).argmax(axis=1)
        return FreshErrors(errors=int((answers != self._label_of(group, drawn)).sum()), source=drawn.source)

    def _label_of(self, group: Group, drawn: Perturbations) -> Array:
        if self._images.is_residual:
            return self._images.sources.label_of(drawn.source)
        return findings.label_of(drawn.latent, group, self._failures)


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
