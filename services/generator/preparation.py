"""The stage `prepare`, and the estimate of a run's cost.

The stage makes the preflight, the VAE, the label model and the reference latents, and chooses the rendering.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from defuse.errors import NotReady
from defuse.v1 import run_pb2, tensor_pb2, work_pb2
from torch import nn

from services.arrays import Array
from services.generator import codec, noise, pipeline, vae, vae_training
from services.generator.codec import Codec, aggregate_sd
from services.generator.pilot import SOURCES, run_pilot
from services.generator.preflight import PreflightRefused, check_accuracy, check_reconstructions, measure_margins
from services.generator.run_context import DECODER, PreparedRun, RunContext, real_images
from services.generator.run_vae import TRAINING_SHARE, run_codec, vae_config
from services.generator.validity import MAX_REFERENCES, Reference
from services.latent_space import label_model
from services.latent_space.image_label_model import (
    ImageLabelModel,
    image_label_model_bytes,
    read_image_label_model,
    train_image_label_model,
)
from services.latent_space.label_model import LabelModel
from services.onnx_graph.onnx_files import to_onnx
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import LabelledImages, estimate, is_open, is_residual, reads_images, settle

# Labelled images of the preflight, and training images for label model and latent scale: bounds time and memory for any
# size of data set.
_PREFLIGHT_IMAGES = 2_000
_TRAINING_LATENTS = 50_000


def prepare(context: RunContext, work: work_pb2.PrepareWork, job: Job) -> work_pb2.Event:
    """Run the preflight, obtain the VAE, choose the rendering, and store the search's inputs."""
    run = work.run
    context.use_all_threads()
    if not context.store.exists(keys.preflight(run.name)):
        try:
            context.store.write_message(keys.preflight(run.name), _prepare(context, run, job))
        except PreflightRefused as error:
            raise NotReady(str(error), reason=error.reason) from error
    event = work_pb2.Event(subject=run.name)
    event.prepared.source_count = len(context.prepared(run).index)
    event.prepared.preflight.CopyFrom(context.store.read_message(keys.preflight(run.name), run_pb2.Preflight))
    event.prepared.config.CopyFrom(context.store.read_message(keys.settled_config(run.name), run_pb2.RunConfig))
    return event


def _prepare(context: RunContext, run: run_pb2.Run, job: Job) -> run_pb2.Preflight:
    searched = context.images(run, keys.SEARCHED_SPLIT)
    index = noise.choose_positions(
        seed=run.config.seed, count=len(searched.labels), limit=run.config.search.max_sources
    )
    sample = index[noise.choose_positions(seed=run.config.seed, count=len(index), limit=_PREFLIGHT_IMAGES)]
    _report_note(job, 0.0, "asking the served classifier about labelled images")
    right = _read_correctly(context, run, searched, sample)
    check_accuracy(right, len(sample), declared=run.config.preflight.declared_accuracy)
    train = context.images(run, "train")
    latents = _TrainingLatents(context=context, run=run, train=train, codec=run_codec(context, run, train, job))
    _report_note(job, TRAINING_SHARE, "describing the training images in latent space")
    sd_agg = _store_reference(latents)
    job.check_cancelled()
    result = run_pb2.Preflight(accuracy=estimate(right, len(sample)))
    run = _settled(latents, index, sd_agg, result, job)
    result.label_model_accuracy = _store_label_model(replace(latents, run=run))
    job.check_cancelled()
    _report_note(job, 0.95, "classifying unperturbed reconstructions")
    result.reconstruction_accuracy.CopyFrom(_check_reconstructions(context, run, sample, sd_agg, job))
    held_out = noise.is_held_out(seed=run.config.seed, source=index, fraction=run.config.search.held_out_fraction)
    prepared = PreparedRun(index=index, sd_agg=sd_agg, held_out=held_out.astype(np.uint8))
    context.store.write_arrays(keys.sources(run.name), prepared.arrays())
    return result


def _read_correctly(context: RunContext, run: run_pb2.Run, images: LabelledImages, rows: Array) -> int:
    logits = context.classifier(run).classify_stored(real_images(images, rows))
    return int((logits.argmax(axis=1) == images.labels[rows]).sum())


def _settled(
    latents: "_TrainingLatents", index: Array, sd_agg: Array, result: run_pb2.Preflight, job: Job
) -> run_pb2.Run:
    """Return the run with its rendering, which a pilot chooses when it is open.

    The choice is stored once: a concurrent worker, or a later one, does not choose again.
    """
    context, run = latents.context, latents.run
    if is_open(run.config):
        if not context.store.exists(keys.pilot(run.name)):
            _report_note(job, 0.92, "comparing both renderings on a few images")
            judged = run_pb2.Run(name=run.name, config=settle(run.config, run_pb2.SearchConfig.RENDERING_RESIDUAL))
            _store_label_model(replace(latents, run=judged))
            chosen = run_pilot(context, run, index, sd_agg, job.check_cancelled)
            context.store.create_bytes(keys.pilot(run.name), chosen.SerializeToString(deterministic=True))
        result.pilot.CopyFrom(context.store.read_message(keys.pilot(run.name), run_pb2.Pilot))
        run = run_pb2.Run(name=run.name, config=settle(run.config, result.pilot.rendering))
    context.store.create_bytes(keys.settled_config(run.name), run.config.SerializeToString(deterministic=True))
    return run


def _check_reconstructions(
    context: RunContext, run: run_pb2.Run, sample: Array, sd_agg: Array, job: Job
) -> tensor_pb2.Estimate:
    """Return the share of images, among those read correctly, that are read correctly as reconstructions.

    Raises PreflightRefused when too few are, unless the run does not search reconstructions.
    """
    searched, residual = context.images(run, keys.SEARCHED_SPLIT), is_residual(run.config)
    if residual:  # a figure for the reader, which is not worth many calls of a slow classifier
        sample = sample[noise.choose_positions(seed=run.config.seed, count=len(sample), limit=SOURCES)]
    images = real_images(searched, sample)
    read = measure_margins(
        images,
        searched.labels[sample],
        context.codec(run.config).encode_stored(images)[0],
        replace(context.models(run, sd_agg), residual=False),
        batch_size=run.config.search.batch_size,
        check=job.check_cancelled,
    )
    kept, of = int(read.searchable.sum()), int(read.right_on_image.sum())
    if not residual:
        check_reconstructions(kept, of, allowed_loss=run.config.preflight.max_reconstruction_loss)
    return estimate(kept, of)


@dataclass(frozen=True, kw_only=True)
class _TrainingLatents:
    """Training images of a run, with their posteriors."""

    context: RunContext
    run: run_pb2.Run
    train: LabelledImages
    codec: Codec

    @cached_property
    def rows(self) -> Array:
        """Return the rows (r,) of the training images in use, ascending."""
        return noise.choose_positions(seed=self.run.config.seed, count=len(self.train.labels), limit=_TRAINING_LATENTS)

    @cached_property
    def labels(self) -> Array:
        return np.asarray(self.train.labels[self.rows])

    @cached_property
    def posteriors(self) -> tuple[Array, Array]:
        """Return mu and sigma (r, d)."""
        return self.codec.encode_stored(self.train.images[self.rows])


def _store_reference(latents: _TrainingLatents) -> Array:
    """Store the training images in latent space, and return the latent scale (d,)."""
    store, key, seed = latents.context.store, keys.reference(latents.run.config), latents.run.config.seed
    if not store.exists(key):
        mu, sigma = latents.posteriors
        few = noise.choose_positions(seed=seed ^ 1, count=len(latents.rows), limit=MAX_REFERENCES)
        reference = Reference.of(mu[few], sigma[few], latents.labels[few], aggregate_sd(mu), row=latents.rows[few])
        store.create_arrays(key, reference.arrays())
    # All runs use the stored one, also when two workers made it at once.
    return store.read_arrays(key)["sd_agg"]


def _store_label_model(latents: _TrainingLatents) -> float:
    """Store the label model of a settled run, and return its held-out accuracy."""
    store, config = latents.context.store, latents.run.config
    if not store.exists(key := keys.label_model(config)):
        store.create_bytes(key, _train_label_model(latents))
    # All runs use the stored model, also when two workers trained it at once; the VAE likewise.
    file = store.read_bytes(key)
    model: LabelModel | ImageLabelModel
    if reads_images(config):
        model = read_image_label_model(file)
        shape, given = model.image_shape, "images"
    else:
        model = label_model.from_bytes(file)
        shape, given = (model.latent_dim,), "z"
    if not store.exists(keys.label_model_onnx(config)):
        probabilities = nn.Sequential(model, nn.Softmax(dim=1))
        exported = to_onnx(probabilities, shape, inputs=[given], outputs=["probabilities"])
        store.create_bytes(keys.label_model_onnx(config), exported)
    return model.held_out_accuracy


def _train_label_model(latents: _TrainingLatents) -> bytes:
    run, device = latents.run, latents.context.device
    seed, classes = run.config.seed, len(latents.context.model(run).classes)
    if reads_images(run.config):
        images = latents.train.images[latents.rows]
        return image_label_model_bytes(
            train_image_label_model(images, latents.labels, classes, seed=seed, device=device)
        )
    mu, sigma = latents.posteriors
    return label_model.to_bytes(
        label_model.train_label_model(mu, sigma, latents.labels, classes, seed=seed, device=device)
    )


def _report_note(job: Job, share: float, note: str) -> None:
    job.progress(share, note, state=run_pb2.Run.STATE_PREPARING)


_WARM_UP, _MEASURED = 2, 6  # batches


def estimate_cost(context: RunContext, config: run_pb2.RunConfig) -> run_pb2.CostEstimate:
    """Estimate a run's cost from a few batches, without storing anything."""
    run = run_pb2.Run(config=config)
    context.use_all_threads()
    available = len(context.images(run, keys.SEARCHED_SPLIT).labels)
    sources = min(config.search.max_sources or available, available)
    decodes = sources * config.search.draws_per_source
    pair, training_s = _codec_or_untrained(context, run)
    rate = _decodes_per_s(context, run, pair)
    # Each source is first classified as an image and as a reconstruction.
    return run_pb2.CostEstimate(
        sources=sources,
        decodes=decodes,
        decodes_per_s=rate,
        training_s=training_s,
        search_s=(decodes + 2 * sources) / rate,
    )


def _codec_or_untrained(context: RunContext, run: run_pb2.Run) -> tuple[Codec, float]:
    """Return the run's codec and the seconds of its training.

    An untrained codec of the same size replaces a missing one.
    """
    if run.config.vae.encoder_digest:
        return context.uploaded_codec(run.config), 0.0
    if context.store.exists(keys.vae(run.config, DECODER)):
        return context.codec(run.config), 0.0
    train = context.images(run, "train")
    config = vae_config(run.config.vae, train.images.shape)
    sample = np.array(train.images[: 8 * config.batch_size])
    per_image = vae_training.seconds_per_image(sample, config, device=context.device)
    untrained = vae.new_vae(config, torch.Generator().manual_seed(0))
    return codec.vae_codec(untrained, context.device), per_image * len(train.labels) * config.epochs


def _decodes_per_s(context: RunContext, run: run_pb2.Run, pair: Codec) -> float:
    size = run.config.search.batch_size
    z = np.random.default_rng(0).standard_normal((size, pair.latent_dim)).astype(np.float32)

    submit = context.classifier(run).submit
    for _ in pipeline.classified(_WARM_UP * [z], pair.decode, submit, context.decoders):
        pass
    begin = time.perf_counter()
    for _ in pipeline.classified(_MEASURED * [z], pair.decode, submit, context.decoders):
        pass
    return size * _MEASURED / (time.perf_counter() - begin)
