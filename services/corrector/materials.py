"""What a correction works with, read from the store: images, labels, regions, and which of them decide on what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from defuse import names
from defuse.v1 import correction_pb2, model_pb2, run_pb2

from services.arrays import Array
from services.corrector.curriculum import RegionData, carrying, fresh_latents
from services.latent_space.autoencoder import read_decoder, read_label_model
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages

# Images that early stopping asks about: enough to tell losses apart, little beside an epoch.
_HELD_OUT_IMAGES = 2_000
# Latents around a region that decide: so many, fewer of each where there are many regions, but some.
_AROUND, _AROUND_IN_ALL, _LEAST_AROUND = 256, 4_096, 32
# How many times as large as the region's their covariance is.
_SPREAD = 2.0
# Sets their draws apart from others of the same seed.
_AROUND_STREAM = 0x41524F55
# Sets the division of held-out sources apart from other draws of the same seed.
_HALVES = 0x48414C56


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out images of one labelled region: failures around sources that correction does not learn from."""

    region: str
    label: str
    label_id: int
    # (m, d)
    latent: Array


class Materials:
    """Reads what the trainings of a correction, and the choice among them, need."""

    def __init__(self, store: ArtifactStore, correction: correction_pb2.Correction) -> None:
        self.store = store
        self.correction = correction
        self._catalog = Catalog(store)
        self.run: run_pb2.Run = self._catalog.run(names.parent(correction.name))
        self.model: model_pb2.Model = self._catalog.model(correction.model)

    @property
    def deployed_file(self) -> bytes:
        """The ONNX file of the version that is corrected."""
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
    def believed(self) -> Callable[[Array], Array]:
        """What tells labels from latents: (n, d) to (n, k)."""
        return read_label_model(self.store, self.run.config)

    def regions(self) -> list[RegionData]:
        """Return what is known of each labelled region."""
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
        """Return failures of the run, drawn at random and each labelled by itself as its source is."""
        failures = self._catalog.all_failures(self.run.name)
        usable = np.flatnonzero(failures["held_out"] == 0)
        generator = np.random.default_rng(self.correction.config.seed)
        chosen = generator.choice(usable, size=min(count, len(usable)), replace=False)
        return [RegionData.single(failures["latent"][row], int(failures["true_label"][row])) for row in chosen]

    def held_out_original(self) -> LabelledImages:
        """Return real images that neither training nor any region's failures come from; they decide on stopping."""
        split = self._split(keys.SEARCHED_SPLIT)
        seen = np.concatenate([arrays["source"] for _, arrays in self._region_arrays()])
        unseen = np.setdiff1d(np.arange(len(split.labels)), seen)
        generator = np.random.default_rng(self.run.config.seed)
        rows = np.sort(generator.choice(unseen, size=min(_HELD_OUT_IMAGES, len(unseen)), replace=False))
        return LabelledImages(images=split.images[rows], labels=split.labels[rows])

    def held_out_regions(self, *, deciding: bool) -> list[HeldOut]:
        """Return the held-out failures of each region: one half decides on stopping and choice, the other on nothing.

        Halves are of sources, the same ones in every correction of a run: what was used to decide is never reported.
        """
        count = len(self._split(keys.SEARCHED_SPLIT).labels)
        decides = np.random.default_rng([self.run.config.seed, _HALVES]).random(count) < 0.5
        return [
            HeldOut(
                region=region.region,
                label=region.label,
                label_id=self._class_id(region.label),
                latent=arrays["held_out_latent"][decides[arrays["held_out_source"]] == deciding],
            )
            for region, arrays in self._region_arrays()
        ]

    def around_regions(self) -> list[HeldOut]:
        """Return fresh latents around each region, wider than those that corrections learn from; they decide, too.

        Held-out failures lie next to the boundary that any correction moves first; how far it reaches into the region
        shows beyond them. Only latents that still carry the region's label are among them.
        """
        count = max(_LEAST_AROUND, min(_AROUND, _AROUND_IN_ALL // len(self.correction.regions)))
        generator = np.random.default_rng([self.run.config.seed, _AROUND_STREAM])
        least = self.run.config.validity.min_label_probability

        def around(region: RegionData) -> Array:
            carried = carrying(self.believed, region.label, least)
            return fresh_latents(region, count, carried, generator, spread=_SPREAD)

        return [
            HeldOut(region=labelled.region, label=labelled.label, label_id=region.label, latent=around(region))
            for labelled, region in zip(self.correction.regions, self.regions(), strict=True)
        ]

    def pictures(self, region: str) -> Array:
        """Return the stored images (n, h, w, c) that an annotator sees of a region."""
        return self.store.read_arrays(keys.region_arrays(region))["exemplars"]

    def decoded(self, latent: Array) -> Array:
        """Return the images (n, c, h, w) in [0, 1] of latents (n, d), also of none."""
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
