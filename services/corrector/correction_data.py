"""The data of a correction, read from the store.

They are images, labels, regions, and the region images that decide the choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from defuse import names
from defuse.v1 import correction_pb2, model_pb2, run_pb2

from services.arrays import Array
from services.latent_space.autoencoder import read_decoder, read_label_model
from services.latent_space.label_model import draw_carrying
from services.statistics.gaussian import Gaussian
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages


@dataclass(frozen=True, kw_only=True)
class RegionData:
    """A labelled region: the failures that correction may use, and its Gaussian."""

    # (m, d)
    latent: Array
    # (d,) and (d, d)
    mean: Array
    covariance: Array
    # Class id of the annotation.
    label: int

    @classmethod
    def single(cls, latent: Array, label: int) -> Self:
        """Return one failure (d,) as a region without a distribution around it."""
        return cls(latent=latent[None], mean=latent, covariance=np.zeros((len(latent), len(latent))), label=label)


def carries_label(
    label_probabilities: Callable[[Array], Array], label: int, min_label_probability: float
) -> Callable[[Array], Array]:
    """Return a function that tests which latents (n, d) carry a label.

    It returns (n,) bool. `label_probabilities` is the label model, which maps latents (n, d) to probabilities (n, k).
    """
    return lambda z: np.asarray(label_probabilities(z)[:, label] >= min_label_probability)


def fresh_latents(
    region: RegionData,
    count: int,
    carried: Callable[[Array], Array],
    generator: np.random.Generator,
    *,
    spread: float = 1.0,
) -> Array:
    """Draw latents (n, d) of a region's Gaussian that carry its label.

    There are at most `count` of them, and none for a region without a covariance.
    `carried` tests latents and returns (n,) bool. `spread` scales the region's
    covariance: wider draws carry the label less often.
    """
    if not region.covariance.any():
        return region.latent[:0]
    gaussian = Gaussian(mean=region.mean, covariance=spread * region.covariance)
    return draw_carrying(lambda size: gaussian.sample(size, generator), count, carried)


def sample_region(
    region: RegionData, count: int, carried: Callable[[Array], Array], generator: np.random.Generator
) -> Array:
    """Draw latents (count, d) of a region that carry its label.

    `carried` tests latents and returns (n,) bool. Failures of the region replace missing draws. They are not preferred,
    because they lie where the search found them, next to the boundary and around few sources, and represent the region
    less well (docs/explanation/method.md).
    """
    fresh = fresh_latents(region, count, carried, generator)
    order = generator.permutation(len(region.latent))
    known = region.latent[np.resize(order, count - len(fresh))]
    return np.concatenate([fresh, known]).astype(np.float32)  # (count, d)


def region_latents(
    regions: Sequence[RegionData],
    *,
    per_region: int,
    label_probabilities: Callable[[Array], Array],
    min_label_probability: float,
    seed: int,
) -> tuple[Array, Array]:
    """Return latents (n, d) and labels (n,), equally many of each region.

    Small regions thus count as much as large ones. Draws that do not carry the region's label with
    `min_label_probability`, by the label model `label_probabilities`, are replaced. `regions` must not be empty.
    """
    generator = np.random.default_rng(seed)

    def drawn(region: RegionData) -> Array:
        carried = carries_label(label_probabilities, region.label, min_label_probability)
        return sample_region(region, per_region, carried, generator)

    labels = np.repeat([region.label for region in regions], per_region).astype(np.int64)
    return np.concatenate([drawn(region) for region in regions]), labels


# Images for early stopping: enough to compare losses, few beside an epoch.
_HELD_OUT_IMAGES = 2_000
# Deciding latents around a region; fewer of each for many regions, with a lower bound.
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
    # (m, d)
    latent: Array


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
    def decode(self) -> Callable[[Array], Array]:
        return read_decoder(self.store, self.run.config)

    @cached_property
    def label_probabilities(self) -> Callable[[Array], Array]:
        """Return the label model, from latents (n, d) to probabilities (n, k)."""
        return read_label_model(self.store, self.run.config)

    def regions(self) -> list[RegionData]:
        """Return the data of each labelled region."""
        return [
            RegionData(
                latent=arrays["latent"],
                mean=arrays["mean"],
                covariance=arrays["covariance"],
                label=self._class_id(region.label),
            )
            for region, arrays in self._region_arrays()
        ]

    def single_failures(self, count: int) -> list[RegionData]:
        """Return random failures of the run, each with its source's label."""
        failures = self._catalog.all_failures(self.run.name)
        usable = np.flatnonzero(failures["held_out"] == 0)
        generator = np.random.default_rng(self.correction.config.seed)
        chosen = generator.choice(usable, size=min(count, len(usable)), replace=False)
        return [RegionData.single(failures["latent"][row], int(failures["true_label"][row])) for row in chosen]

    def held_out_original(self) -> LabelledImages:
        """Return real images that neither training nor regions use.

        They serve early stopping.
        """
        split = self._split(keys.SEARCHED_SPLIT)
        seen = np.concatenate([arrays["source"] for _, arrays in self._region_arrays()])
        unseen = np.setdiff1d(np.arange(len(split.labels)), seen)
        generator = np.random.default_rng(self.run.config.seed)
        rows = np.sort(generator.choice(unseen, size=min(_HELD_OUT_IMAGES, len(unseen)), replace=False))
        return LabelledImages(images=split.images[rows], labels=split.labels[rows])

    def held_out_regions(self, *, deciding: bool) -> list[HeldOutRegion]:
        """Return the held-out failures of each region.

        One half is for stopping and choice, the other for the report. The split is by source and equal in all
        corrections of a run, so an image that took part in a choice is never reported.
        """
        count = len(self._split(keys.SEARCHED_SPLIT).labels)
        decides = np.random.default_rng([self.run.config.seed, _SPLIT_STREAM]).random(count) < 0.5
        return [
            HeldOutRegion(
                region=region.region,
                label=region.label,
                label_id=self._class_id(region.label),
                latent=arrays["held_out_latent"][decides[arrays["held_out_source"]] == deciding],
            )
            for region, arrays in self._region_arrays()
        ]

    def around_regions(self) -> list[HeldOutRegion]:
        """Return fresh latents around each region, wider than the training data.

        They take part in the choice. Held-out failures lie next to the boundary, which any correction moves first;
        these latents measure how far it moves into the region. All of them carry the region's label.
        """
        count = max(_LEAST_AROUND, min(_AROUND, _AROUND_IN_ALL // len(self.correction.regions)))
        generator = np.random.default_rng([self.run.config.seed, _AROUND_STREAM])
        least = self.run.config.validity.min_label_probability

        def around(region: RegionData) -> Array:
            carried = carries_label(self.label_probabilities, region.label, least)
            return fresh_latents(region, count, carried, generator, spread=_SPREAD)

        return [
            HeldOutRegion(region=labelled.region, label=labelled.label, label_id=region.label, latent=around(region))
            for labelled, region in zip(self.correction.regions, self.regions(), strict=True)
        ]

    def pictures(self, region: str) -> Array:
        """Return the stored images (n, h, w, c) of a region that annotators see."""
        return self.store.read_arrays(keys.region_arrays(region))["exemplars"]

    def decoded(self, latent: Array) -> Array:
        """Return the images (n, c, h, w) in [0, 1] of latents (n, d).

        n may be 0.
        """
        height, width, channels = self.model.image_shape
        return self.decode(latent) if len(latent) else np.zeros((0, channels, height, width), np.float32)

    def _region_arrays(self) -> Sequence[tuple[correction_pb2.LabelledRegion, dict[str, Array]]]:
        return [
            (region, self.store.read_arrays(keys.region_arrays(region.region))) for region in self.correction.regions
        ]

    def _split(self, name: str) -> LabelledImages:
        return self._catalog.split(self.run.config.dataset, name, self.model)

    def _class_id(self, label: str) -> int:
        return list(self.model.classes).index(label)
