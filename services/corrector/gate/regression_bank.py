"""The regression bank: every region that people gave a label is from then on a test that its model must keep."""

from collections.abc import Mapping

import numpy as np
from defuse import names
from defuse.v1 import annotation_pb2, model_pb2

from services.arrays import Array, as_stored
from services.corrector.correction_data import RegionData, carries_label, fresh_latents
from services.latent_space.autoencoder import read_decoder, read_label_model
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

# Images of one region: enough to show a loss of three in a hundred, little beside a test split.
IMAGES = 256
# Of these, at most, held-out failures; the others are drawn anew.
_HELD_OUT = 128
# Sets the draws of the bank apart from others of the same seed.
_STREAM = 0x42414E4B


class Bank:
    """The labelled regions of a model's runs."""

    def __init__(self, store: ArtifactStore, model: model_pb2.Model) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._model = model

    def regions(self) -> Mapping[str, str]:
        """Return the label of each region, by `runs/{run}/regions/{region}`, as people say now."""
        return {
            region.name: region.annotation.label
            for run in self._catalog.runs_of(self._model.name)
            for region in self._catalog.regions(run.name)
            if region.annotation.verdict == annotation_pb2.Annotation.VERDICT_LABEL
        }

    def images(self, region_name: str, label: str) -> Array:
        """Return the images (n, h, w, c) uint8 of a region: always the same ones, whatever becomes of its run.

        Held-out failures first, then fresh draws from its Gaussian that still carry the label: no correction was
        trained on either. Fewer than `IMAGES` where few draws carry it; none are repeated.
        """
        key = keys.banked_region(self._model.name, region_name, label)
        if not self._store.exists(key):
            self._store.create_arrays(key, {"images": self._drawn(region_name, label)})
        return self._store.read_arrays(key)["images"]

    def _drawn(self, region_name: str, label: str) -> Array:
        run = self._catalog.run(names.parent(region_name))
        arrays = self._store.read_arrays(keys.region_arrays(region_name))
        held_out = arrays["held_out_latent"][:_HELD_OUT]
        label_id = list(self._model.classes).index(label)
        least = run.config.validity.min_label_probability
        region = RegionData(latent=held_out, mean=arrays["mean"], covariance=arrays["covariance"], label=label_id)
        fresh = fresh_latents(
            region,
            IMAGES - len(held_out),
            carries_label(read_label_model(self._store, run.config), label_id, least),
            np.random.default_rng([run.config.seed, _STREAM]),
        )
        latent = np.concatenate([held_out, fresh])
        if not len(latent):
            return np.zeros((0, *self._model.image_shape), np.uint8)
        return as_stored(read_decoder(self._store, run.config)(latent))
