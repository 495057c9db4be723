"""The run context: a run's model, images, codec and reference.

They are read from the store once.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import model_pb2, run_pb2

from services.arrays import Array
from services.generator import codec, vae
from services.generator.codec import Codec, CodecMismatch
from services.generator.perturbations import NoiseModel, Sources, screening_by
from services.generator.pipeline import DecoderPool
from services.generator.search import SearchChecks, SearchModels
from services.generator.validity import Reference, Thresholds, fit_thresholds, latent_checks
from services.latent_space import label_model
from services.latent_space.image_label_model import probability_of_label, read_image_label_model
from services.onnx_graph.onnx_files import onnx_function
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages, is_residual
from services.triton.client import Classifier, InferenceClient

# A thread waits for the GPU before it sends a batch to Triton, and before it knows which draws passed; meanwhile the
# others queue work for the GPU. All share its default stream, which runs one kernel after the other.
_DECODERS_OF_A_GPU = 4
VAE, ENCODER, DECODER = "vae.safetensors", "encoder.onnx", "decoder.onnx"


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """The results of the stage `prepare`, for the search."""

    # (n,) positions of the sources in the searched split
    index: Array
    # (d,)
    sd_agg: Array
    # (n,) 1 for sources held out of correction
    held_out: Array

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class RunContext:
    """Reads the data of runs, and caches the last few reads."""

    def __init__(self, store: ArtifactStore, inference: InferenceClient, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        on_cpu = device.type == "cpu"
        self.decoders = DecoderPool(
            self.threads if on_cpu else _DECODERS_OF_A_GPU, at_start=functools.partial(torch.set_num_threads, 1)
        )
        self.store = store
        self.catalog = Catalog(store)
        self.inference = inference
        self.device = device
        self._images = functools.lru_cache(maxsize=4)(self._read_images)
        self._codec = functools.lru_cache(maxsize=2)(self._read_codec)
        self._prepared = functools.lru_cache(maxsize=2)(self._read_prepared)
        self._checks = functools.lru_cache(maxsize=2)(self._read_checks)

    def model(self, run: run_pb2.Run) -> model_pb2.Model:
        return self.catalog.model(run.config.model)

    def classifier(self, run: run_pb2.Run) -> Classifier:
        """Return the classifier under test, at the run's version."""
        return self.inference.classifier(self.model(run), version=run.config.model_version)

    def images(self, run: run_pb2.Run, split: str) -> LabelledImages:
        """Return a split, with labels as the model's class ids."""
        return self._images(run.config.dataset, split, run.config.model)

    def codec(self, config: run_pb2.RunConfig) -> Codec:
        """Return a run's codec; raise NotReady while it is not stored."""
        return self._codec(keys.vae(config, ""), config.model)

    def uploaded_codec(self, config: run_pb2.RunConfig) -> Codec:
        """Return the uploaded codec; raise InvalidInput for invalid files."""
        height, width, channels = self.catalog.model(config.model).image_shape
        encoder, decoder = (
            self.store.read_bytes(keys.file(digest))
            for digest in (config.vae.encoder_digest, config.vae.decoder_digest)
        )
        return uploaded_pair(encoder, decoder, (channels, height, width))

    def prepared(self, run: run_pb2.Run) -> PreparedRun:
        return self._prepared(run.name)

    def models(self, run: run_pb2.Run, sd_agg: Array) -> SearchModels:
        """Return the functions that the search calls for this run."""
        pair, oracle = self.codec(run.config), run.config.validity.oracle
        second = (
            self.inference.classifier(self.catalog.model(oracle), version=run.config.validity.oracle_version).submit
            if oracle
            else None
        )
        submit = self.classifier(run).submit
        return SearchModels(
            decode=pair.decode,
            encode=pair.encode,
            submit=submit,
            sd_agg=sd_agg,
            decoders=self.decoders,
            device=self.device,
            residual=is_residual(run.config),
            oracle=second,
        )

    def use_all_threads(self) -> None:
        """Let torch use all its threads in the calling thread.

        The threads of the decoder pool use one each.
        """
        torch.set_num_threads(self.threads)

    def checks(self, run: run_pb2.Run) -> SearchChecks:
        """Return the checks that a misclassified perturbation must pass."""
        record_keys = keys.label_model(run.config), keys.reference(run.config)
        return self._checks(*record_keys, run.config.validity.SerializeToString(deterministic=True))

    def sources(self, run: run_pb2.Run, shard: int, mu: Array) -> Sources:
        """Return the sources of a shard, given their posterior means (n, d)."""
        prepared, part = self.prepared(run), shard_slice(run, shard)
        index, searched = prepared.index[part], self.images(run, keys.SEARCHED_SPLIT)
        return Sources(
            index=index,
            labels=searched.labels[index],
            mu=mu,
            held_out=prepared.held_out[part],
            images=searched.images,
        )

    def _read_images(self, dataset: str, split: str, model: str) -> LabelledImages:
        return self.catalog.split(dataset, split, self.catalog.model(model))

    def _read_codec(self, prefix: str, model: str) -> Codec:
        try:
            if self.store.exists(prefix + VAE):
                return codec.vae_codec(vae.from_bytes(self.store.read_bytes(prefix + VAE)), self.device)
            encoder, decoder = (self.store.read_bytes(prefix + part) for part in (ENCODER, DECODER))
        except NotFound as error:
            raise NotReady(
                "the VAE of this run is not trained yet; wait until it identifies", reason="NO_VAE"
            ) from error
        height, width, channels = self.catalog.model(model).image_shape
        return uploaded_pair(encoder, decoder, (channels, height, width))

    def _read_prepared(self, run_name: str) -> PreparedRun:
        return PreparedRun(**self.store.map_arrays(keys.sources(run_name)))

    def _read_checks(self, label_key: str, reference_key: str, validity: bytes) -> SearchChecks:
        wanted = run_pb2.ValidityConfig.FromString(validity)
        thresholds, reads_images = thresholds_of(wanted), wanted.label_model == run_pb2.ValidityConfig.LABEL_MODEL_IMAGE
        file, reference = self.store.read_bytes(label_key), Reference(**self.store.read_arrays(reference_key))
        of_latents, of_images = None, None
        if reads_images:
            of_images = functools.partial(probability_of_label, read_image_label_model(file).to(self.device))
        else:
            of_latents = functools.partial(label_model.probability_of, label_model.from_bytes(file).to(self.device))
        return SearchChecks(
            latent=latent_checks(thresholds, reference=reference, label_probability=of_latents, device=self.device),
            image_label_probability=of_images,
            min_label_probability=thresholds.min_label_probability,
            screening=screening_by(thresholds, label_probability=of_latents),
            max_round_trip_sd=thresholds.max_round_trip_sd,
        )


def uploaded_pair(encoder: bytes, decoder: bytes, image_shape: tuple[int, int, int]) -> Codec:
    """Return a user's ONNX files as a codec.

    Raises InvalidInput when they are invalid or do not fit the images.
    """
    functions = []
    for part, file in (("encoder", encoder), ("decoder", decoder)):
        try:
            functions.append(onnx_function(file))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise InvalidInput(f"ONNX Runtime cannot open the {part}: {error}", reason="NOT_RUNNABLE") from error
    try:
        return codec.onnx_codec(functions[0], functions[1], image_shape)
    except CodecMismatch as error:
        raise InvalidInput(str(error), reason="UNFIT_VAE") from error


def thresholds_of(config: run_pb2.ValidityConfig) -> Thresholds:
    return Thresholds(**{field.name: getattr(config, field.name) for field in fields(Thresholds)})


def shard_slice(run: run_pb2.Run, shard: int) -> slice:
    """Return the slice of the run's sources that belongs to a shard."""
    size = run.config.search.shard_size
    return slice(shard * size, (shard + 1) * size)


def noise_model_of(run: run_pb2.Run) -> NoiseModel:
    """Return the noise model of a run."""
    wanted = run.config.search
    return NoiseModel(
        seed=run.config.seed,
        radius_sd=wanted.radius_sd,
        released=wanted.noise == run_pb2.SearchConfig.NOISE_RELEASED,
        max_failures_per_source=wanted.max_failures_per_source,
        batch_size=wanted.batch_size,
    )


def is_adaptive(run: run_pb2.Run) -> bool:
    return bool(run.config.search.strategy == run_pb2.SearchConfig.STRATEGY_ADAPTIVE)


def real_images(images: LabelledImages, rows: Array) -> Array:
    """Return the stored images of ascending rows, (n, h, w, c), copied from disk."""
    return np.array(images.images[rows])


def fit_run_thresholds(
    reader: Catalog, run_name: str, *, invalid: Sequence[str], valid: Sequence[str]
) -> run_pb2.ValidityAdvice:
    """Return thresholds that would have rejected a run's invalid regions.

    Raises NotFound for unknown regions.
    """
    run = reader.run(run_name)
    for name in (*invalid, *valid):
        reader.region(name)
    signals = list(reader.region_failures(run_name, [*invalid, *valid]))
    advice = fit_thresholds(signals[: len(invalid)], signals[len(invalid) :], thresholds_of(run.config.validity))
    return run_pb2.ValidityAdvice(
        validity=run_pb2.ValidityConfig(**asdict(advice.thresholds)),
        invalid_rejected=advice.invalid_rejected,
        valid_rejected=advice.valid_rejected,
        invalid_regions=len(invalid),
        valid_regions=len(valid),
    )
