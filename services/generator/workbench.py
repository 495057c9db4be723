"""What the generator's stages work with: a run's model, images, VAE and label model, read from the store once."""

import functools
from dataclasses import dataclass

import torch
from defuse.errors import NotFound, NotReady
from defuse.v1 import model_pb2, run_pb2

from services.generator import label_model, vae, vae_files
from services.generator.search import Array, Models
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog, LabelledImages
from services.runtime.inference import InferenceClient

VAE = "vae.safetensors"


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """What the stage `prepare` leaves for the search, as arrays over the sources of a run."""

    # (n,) positions in the searched split
    index: Array
    # (n, d)
    mu: Array
    # (d,)
    sd_agg: Array
    # (n,) 1 where the source is kept out of correction
    held_out: Array

    def arrays(self) -> dict[str, Array]:
        return {"index": self.index, "mu": self.mu, "sd_agg": self.sd_agg, "held_out": self.held_out}


class Workbench:
    """Reads what a run needs and keeps the last few things read."""

    def __init__(self, store: ArtifactStore, inference: InferenceClient, device: torch.device) -> None:
        self.store = store
        self.catalog = Catalog(store)
        self.inference = inference
        self.device = device
        self.vae = functools.lru_cache(maxsize=2)(self._vae)
        self._images = functools.lru_cache(maxsize=2)(self._read_images)
        self._prepared = functools.lru_cache(maxsize=2)(self._read_prepared)
        self._label_model = functools.lru_cache(maxsize=2)(self._read_label_model)

    def model(self, run: run_pb2.Run) -> model_pb2.Model:
        return self.catalog.model(run.config.model)

    def images(self, run: run_pb2.Run, split: str) -> LabelledImages:
        """Return a split of the run's data set, labels as class ids of its model."""
        return self._images(run.config.dataset, split, run.config.model)

    def prepared(self, run: run_pb2.Run) -> PreparedRun:
        return self._prepared(run.name)

    def models(self, run: run_pb2.Run) -> Models:
        """Return the functions that the search asks for this run."""
        network = self.vae(catalog.vae(run.config, VAE))
        labels = self._label_model(run.name)
        classifier = self.inference.classifier(self.model(run), version=run.config.model_version)
        return Models(
            decode=functools.partial(self.decode, network),
            submit=classifier.submit,
            label_probability=functools.partial(label_model.probability_of, labels),
            sd_agg=self.prepared(run).sd_agg,
        )

    @torch.inference_mode()
    def decode(self, network: vae.Vae, z: Array) -> Array:
        """Decode latents (n, d) to images (n, c, h, w) in [0, 1]."""
        images: Array = network.decode(torch.from_numpy(z).to(self.device)).cpu().numpy()
        return images

    def _vae(self, key: str) -> vae.Vae:
        try:
            return vae_files.from_bytes(self.store.read_bytes(key)).to(self.device).eval()
        except NotFound as error:
            raise NotReady(
                "the VAE of this run is not trained yet; wait until it identifies", reason="NO_VAE"
            ) from error

    def _read_images(self, dataset: str, split: str, model: str) -> LabelledImages:
        return self.catalog.split(dataset, split, self.catalog.model(model))

    def _read_prepared(self, run_name: str) -> PreparedRun:
        return PreparedRun(**self.store.read_arrays(catalog.sources(run_name)))

    def _read_label_model(self, run_name: str) -> label_model.LabelModel:
        return label_model.from_bytes(self.store.read_bytes(catalog.label_model(run_name))).to(self.device).eval()
