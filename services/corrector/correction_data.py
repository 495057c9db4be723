"""The data of a correction, read from the store.

They are images, labels, regions, and the region images that decide the choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from defuse import names
from defuse.v1 import correction_pb2, model_pb2, run_pb2

from services.arrays import Array
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RegionShape, RunImages, SearchedSources, SourceFilter
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages


@dataclass(frozen=True, kw_only=True)
class RegionData:
    """A labelled region: the failures that correction may use, and its shape."""

    failures: Perturbations
    # None for a single failure, which has no distribution around it.
    shape: RegionShape | None
    # Class id of the annotation.
    label: int

    @classmethod
    def of(cls, arrays: Mapping[str, Array], label: int) -> Self:
        """Return the data of a region's stored arrays."""
        failures = Perturbations(latent=arrays["latent"], source=arrays["source"])
        return cls(failures=failures, shape=RegionShape.of(arrays), label=label)


def fresh_images(
    images: RunImages,
    region: RegionData,
    count: int,
    generator: np.random.Generator,
    *,
    spread: float = 1.0,
    of_source: SourceFilter,
) -> Perturbations:
    """Draw at most `count` fresh perturbations of a region that carry its label; see `RunImages.fresh`."""
    if region.shape is None:
        return region.failures.take(slice(0))
    return images.fresh(
        region.shape,
        lambda drawn: np.full(len(drawn), region.label),
        count,
        generator,
        spread=spread,
        of_source=of_source,
    )


def sample_region(images: RunImages, region: RegionData, count: int, generator: np.random.Generator) -> Perturbations:
    """Draw `count` perturbations of a region that carry its label, around sources that correction may use.

    Failures of the region replace missing draws. They are not preferred, because they lie where the search found them,
    next to the boundary and around few sources, and represent the region less well (docs/explanation/method.md).
    """
    fresh = fresh_images(images, region, count, generator, of_source=lambda sources: ~sources.held_out)
    order = generator.permutation(len(region.failures))
    return Perturbations.joined([fresh, region.failures.take(np.resize(order, count - len(fresh)))])


def sample_regions(
    images: RunImages, regions: Sequence[RegionData], *, per_region: int, seed: int
) -> tuple[Perturbations, Array]:
    """Return perturbations and their labels (n,), equally many of each region.

    Small regions thus count as much as large ones. `regions` must not be empty.
    """
    generator = np.random.default_rng(seed)
    labels = np.repeat([region.label for region in regions], per_region).astype(np.int64)
    return Perturbations.joined([sample_region(images, region, per_region, generator) for region in regions]), labels


# Images for early stopping: enough to compare losses, few beside an epoch.
_HELD_OUT_IMAGES = 2_000
# Deciding images around a region; fewer of each for many regions, with a lower bound.
_AROUND, _AROUND_IN_ALL, _LEAST_AROUND = 256, 4_096, 32
# Factor of their covariance over the region's.
_SPREAD = 2.0
# Separates these draws from others of the same seed.
_AROUND_STREAM = 0x41524F55
# Separates the split of held-out sources from other draws of the same seed.
_SPLIT_STREAM = 0x48414C56


@dataclass(frozen=True, kw_only=True)
class HeldOutRegion:
    """Held-out images of one labelled region.

    They are failures around sources that correction does not train on.
    """

    region: str
    label: str
    label_id: int
    perturbations: Perturbations


class CorrectionData:
    """Reads the data of a correction's trainings and choice."""

    def __init__(self, store: ArtifactStore, correction: correction_pb2.Correction) -> None:
        self.store = store
        self.correction = correction
        self._catalog = Catalog(store)
        self.run: run_pb2.Run = self._catalog.run(names.parent(correction.name))
        self.model: model_pb2.Model = self._catalog.model(correction.model)

    @property
    def deployed_file(self) -> bytes:
        """Return the ONNX file of the version that is corrected."""
        return self.store.read_bytes(keys.model_file(self.model.name, self.correction.base_version))

    @cached_property
    def train(self) -> LabelledImages:
        return self._split("train")

    @cached_property
    def test(self) -> LabelledImages:
        return self._split("test")

    @cached_property
    def images(self) -> RunImages:
        return RunImages(self.store, self.run)

    def regions(self) -> list[RegionData]:
        """Return the data of each labelled region."""
        return [RegionData.of(arrays, self._class_id(region.label)) for region, arrays in self._region_arrays()]

    def single_failures(self, count: int) -> list[RegionData]:
        """Return random failures of the run, each with its source's label."""
        failures = self._catalog.all_failures(self.run.name)
        usable = np.flatnonzero(failures["held_out"] == 0)
        generator = np.random.default_rng(self.correction.config.seed)
        chosen = generator.choice(usable, size=min(count, len(usable)), replace=False)
        every = Perturbations(latent=failures["latent"], source=failures["source"])
        return [
            RegionData(failures=every.take(row[None]), shape=None, label=int(failures["true_label"][row]))
            for row in chosen
        ]

    def held_out_original(self) -> LabelledImages:
        """Return real images that neither training nor regions use.

        They serve early stopping.
        """
        split = self._split(keys.SEARCHED_SPLIT)
        seen = np.concatenate([arrays["source"] for _, arrays in self._region_arrays()])
        if self.images.is_residual:  # training changes these
            sources = self.images.sources
            seen = np.concatenate([seen, sources.images.row[~sources.held_out]])
        unseen = np.setdiff1d(np.arange(len(split.labels)), seen)
        generator = np.random.default_rng(self.run.config.seed)
        rows = np.sort(generator.choice(unseen, size=min(_HELD_OUT_IMAGES, len(unseen)), replace=False))
        return LabelledImages(images=split.images[rows], labels=split.labels[rows])

    def held_out_regions(self, *, deciding: bool) -> list[HeldOutRegion]:
        """Return the held-out failures of each region.

        One half is for stopping and choice, the other for the report. The split is by source and equal in all
        corrections of a run, so an image that took part in a choice is never reported.
        """
        return [
            HeldOutRegion(
                region=region.region,
                label=region.label,
                label_id=self._class_id(region.label),
                perturbations=held_out_failures(arrays).take(self._decides[arrays["held_out_source"]] == deciding),
            )
            for region, arrays in self._region_arrays()
        ]

    def around_regions(self) -> list[HeldOutRegion]:
        """Return fresh images around each region, wider than the training data.

        They take part in the choice. Held-out failures lie next to the boundary, which any correction moves first;
        these images measure how far it moves into the region. All of them carry the region's label.
        """
        count = max(_LEAST_AROUND, min(_AROUND, _AROUND_IN_ALL // len(self.correction.regions)))
        generator = np.random.default_rng([self.run.config.seed, _AROUND_STREAM])

        def held_out_deciding(sources: SearchedSources) -> Array:
            return np.asarray(sources.held_out & self._decides[sources.images.row])

        return [
            HeldOutRegion(
                region=labelled.region,
                label=labelled.label,
                label_id=region.label,
                perturbations=fresh_images(
                    self.images, region, count, generator, spread=_SPREAD, of_source=held_out_deciding
                ),
            )
            for labelled, region in zip(self.correction.regions, self.regions(), strict=True)
        ]

    def pictures(self, region: str) -> Array:
        """Return the stored images (n, h, w, c) of a region that annotators see."""
        return self.store.read_arrays(keys.region_arrays(region))["exemplars"]

    def rendered(self, perturbations: Perturbations) -> Array:
        """Return the images (n, c, h, w) in [0, 1] of perturbations.

        n may be 0.
        """
        height, width, channels = self.model.image_shape
        if not len(perturbations):
            return np.zeros((0, channels, height, width), np.float32)
        return self.images.render(perturbations)

    @cached_property
    def _decides(self) -> Array:
        """Return which images (N,) of the searched split serve stopping and choice rather than the report."""
        count = len(self._split(keys.SEARCHED_SPLIT).labels)
        return np.random.default_rng([self.run.config.seed, _SPLIT_STREAM]).random(count) < 0.5

    def _region_arrays(self) -> Sequence[tuple[correction_pb2.LabelledRegion, dict[str, Array]]]:
        return [
            (region, self.store.read_arrays(keys.region_arrays(region.region))) for region in self.correction.regions
        ]

    def _split(self, name: str) -> LabelledImages:
        return self._catalog.split(self.run.config.dataset, name, self.model)

    def _class_id(self, label: str) -> int:
        return list(self.model.classes).index(label)


def held_out_failures(arrays: Mapping[str, Array]) -> Perturbations:
    return Perturbations(latent=arrays["held_out_latent"], source=arrays["held_out_source"])
