"""The stage `prepare`, and the estimate of a run's cost.

The stage makes the preflight, the VAE, the label model and the reference latents.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from defuse.errors import Cancelled, NotFound, NotReady
from defuse.v1 import run_pb2, work_pb2
from torch import nn

from services.arrays import Array
from services.generator import codec, noise, pipeline, vae, vae_training
from services.generator.codec import Codec, aggregate_sd
from services.generator.preflight import PreflightRefused, check_accuracy, check_reconstructions, measure_margins
from services.generator.run_context import DECODER, ENCODER, VAE, PreparedRun, RunContext, real_images
from services.generator.validity import MAX_REFERENCES, Reference
from services.latent_space import label_model
from services.onnx_graph.onnx_files import to_onnx
from services.runtime.worker import Job
from services.storage import keys
from services.storage.catalog import LabelledImages, estimate

# Labelled images of the preflight, and training images for label model and latent scale: bounds time and memory for any
# size of data set.
_PREFLIGHT_IMAGES = 2_000
_TRAINING_LATENTS = 50_000
CHECKPOINTS = "checkpoints"
_TRAINING_SHARE = 0.9  # of the progress of `prepare`


def prepare(context: RunContext, work: work_pb2.PrepareWork, job: Job) -> work_pb2.Event:
    """Run the preflight, obtain the VAE, and store the search's inputs."""
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
    pair = _codec(context, run, train, job)
    _report_note(job, _TRAINING_SHARE, "describing the training images in latent space")
    sd_agg, trained_model = _store_reference(context, run, pair, train)
    job.check_cancelled()
    _report_note(job, 0.95, "classifying unperturbed reconstructions")
    read = measure_margins(
        real_images(searched, sample),
        searched.labels[sample],
        pair.encode_stored(real_images(searched, sample))[0],
        context.models(run, sd_agg),
        batch_size=run.config.search.batch_size,
        check=job.check_cancelled,
    )
    kept, of = int(read.searchable.sum()), int(read.right_on_image.sum())
    check_reconstructions(kept, of, allowed_loss=run.config.preflight.max_reconstruction_loss)
    held_out = noise.is_held_out(seed=run.config.seed, source=index, fraction=run.config.search.held_out_fraction)
    prepared = PreparedRun(index=index, sd_agg=sd_agg, held_out=held_out.astype(np.uint8))
    context.store.write_arrays(keys.sources(run.name), prepared.arrays())
    return run_pb2.Preflight(
        accuracy=estimate(right, len(sample)),
        reconstruction_accuracy=estimate(kept, of),
        label_model_accuracy=trained_model,
    )


def _read_correctly(context: RunContext, run: run_pb2.Run, images: LabelledImages, rows: Array) -> int:
    logits = context.classifier(run).classify_stored(real_images(images, rows))
    return int((logits.argmax(axis=1) == images.labels[rows]).sum())


def _store_reference(context: RunContext, run: run_pb2.Run, pair: Codec, train: LabelledImages) -> tuple[Array, float]:
    """Store the label model and the reference.

    Returns the latent scale (d,) and the label model's held-out accuracy.
    """
    record_keys = keys.label_model(run.config), keys.reference(run.config)
    if not all(context.store.exists(key) for key in record_keys):
        trained_model, reference = _build_reference(context, run, pair, train)
        context.store.create_bytes(record_keys[0], label_model.to_bytes(trained_model))
        context.store.create_arrays(record_keys[1], reference.arrays())
    # All runs use the stored model, also when two workers trained it at once; the VAE likewise.
    trained_model = label_model.from_bytes(context.store.read_bytes(record_keys[0]))
    if not context.store.exists(keys.label_model_onnx(run.config)):
        probabilities = nn.Sequential(trained_model, nn.Softmax(dim=1))
        file = to_onnx(probabilities, (trained_model.latent_dim,), inputs=["z"], outputs=["probabilities"])
        context.store.create_bytes(keys.label_model_onnx(run.config), file)
    return context.store.read_arrays(record_keys[1])["sd_agg"], trained_model.held_out_accuracy


def _build_reference(
    context: RunContext, run: run_pb2.Run, pair: Codec, train: LabelledImages
) -> tuple[label_model.LabelModel, Reference]:
    """Train the label model on labelled training images, and make the reference."""
    seed = run.config.seed
    rows = noise.choose_positions(seed=seed, count=len(train.labels), limit=_TRAINING_LATENTS)
    mu, sigma = pair.encode_stored(train.images[rows])
    labels, sd_agg = train.labels[rows], aggregate_sd(mu)
    classes = len(context.model(run).classes)
    trained_model = label_model.train_label_model(mu, sigma, labels, classes, seed=seed, device=context.device)
    few = noise.choose_positions(seed=seed ^ 1, count=len(rows), limit=MAX_REFERENCES)
    return trained_model, Reference.of(mu[few], sigma[few], labels[few], sd_agg, row=rows[few])


def _codec(context: RunContext, run: run_pb2.Run, train: LabelledImages, job: Job) -> Codec:
    """Return the run's codec, uploaded or trained.

    It is made once for all runs that share it.
    """
    record_keys = {part: keys.vae(run.config, part) for part in (ENCODER, DECODER, VAE)}
    if run.config.vae.encoder_digest:
        if not context.store.exists(record_keys[DECODER]):
            _take_pair(context, run, record_keys)
        return context.codec(run.config)
    if not context.store.exists(record_keys[VAE]):
        context.store.create_bytes(record_keys[VAE], vae.to_bytes(_train_vae(context, run, train, job)))
        for key in _checkpoints(context, keys.vae(run.config, CHECKPOINTS)):
            context.store.remove(key)
    # All runs use the stored VAE, also when two workers trained it at once.
    stored = context.store.read_bytes(record_keys[VAE])
    for part, export in ((ENCODER, vae.encoder_onnx), (DECODER, vae.decoder_onnx)):
        if not context.store.exists(record_keys[part]):
            context.store.create_bytes(record_keys[part], export(vae.from_bytes(stored)))
    return context.codec(run.config)


def _take_pair(context: RunContext, run: run_pb2.Run, record_keys: dict[str, str]) -> None:
    context.uploaded_codec(run.config)  # raises for a pair that does not fit
    wanted = run.config.vae
    encoder, decoder = (
        context.store.read_bytes(keys.file(digest)) for digest in (wanted.encoder_digest, wanted.decoder_digest)
    )
    context.store.create_bytes(record_keys[ENCODER], encoder)
    context.store.create_bytes(record_keys[DECODER], decoder)


def _train_vae(context: RunContext, run: run_pb2.Run, train: LabelledImages, job: Job) -> vae.Vae:
    """Train the run's VAE, from the last checkpoint if there is one.

    A worker that died leaves a checkpoint.
    """
    prefix = keys.vae(run.config, CHECKPOINTS)

    def on_checkpoint(epoch: int, checkpoint: bytes) -> None:
        context.store.write_bytes(f"{prefix}/{epoch:05d}", checkpoint)
        for key in _checkpoints(context, prefix)[:-1]:
            context.store.remove(key)

    try:
        return vae_training.train_vae(
            train.images,
            vae_config(run.config.vae, train.images.shape),
            seed=run.config.vae.seed,
            device=context.device,
            on_epoch=_report(job),
            should_stop=job.cancelled,
            resume=_last_checkpoint(context, prefix),
            on_checkpoint=on_checkpoint,
        )
    except vae_training.TrainingCancelled as error:
        raise Cancelled(f"{run.name} was cancelled") from error
    except FloatingPointError as error:
        raise NotReady(
            f"the VAE cannot be trained on these images ({error}); try another vae.beta or vae.latent_dim, or bring an "
            "encoder and a decoder of your own",
            reason="VAE_DIVERGED",
        ) from error


def _checkpoints(context: RunContext, prefix: str) -> list[str]:
    """Return the keys of checkpoints, by ascending epoch.

    Partial ones of a killed worker are left out.
    """
    return [key for key in context.store.keys(prefix) if key.rsplit("/", 1)[-1].isdecimal()]


def _last_checkpoint(context: RunContext, prefix: str) -> tuple[int, bytes] | None:
    for key in reversed(_checkpoints(context, prefix)):
        with suppress(NotFound):  # another run that trains the same VAE went on and removed it
            return int(key.rsplit("/", 1)[-1]), context.store.read_bytes(key)
    return None


def vae_config(wanted: run_pb2.VaeConfig, images: tuple[int, ...]) -> vae.VaeConfig:
    """Return the VAE's configuration for training images of shape (n, h, w, c)."""
    count, height, width, channels = images
    given = {"latent_dim": wanted.latent_dim, "epochs": wanted.epochs, "beta": wanted.beta}
    overrides = {name: value for name, value in given.items() if value}
    return vae.VaeConfig.for_shape((channels, height, width), count, **overrides)


def _report(job: Job) -> Callable[[vae_training.EpochReport], None]:
    def on_epoch(report: vae_training.EpochReport) -> None:
        note = f"training the VAE, epoch {report.epoch} of {report.epochs}, ELBO {report.elbo:.1f}"
        _report_note(job, _TRAINING_SHARE * report.epoch / report.epochs, note)

    return on_epoch


def _report_note(job: Job, share: float, note: str) -> None:
    job.progress(share, note, state=run_pb2.Run.STATE_PREPARING)


_WARM_UP, _MEASURED = 2, 6  # batches


@dataclass(frozen=True, kw_only=True)
class _LatentBatch:
    z: Array


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
    for _ in pipeline.classified(_WARM_UP * [_LatentBatch(z=z)], pair.decode, submit, context.decoders):
        pass
    begin = time.perf_counter()
    for _ in pipeline.classified(_MEASURED * [_LatentBatch(z=z)], pair.decode, submit, context.decoders):
        pass
    return size * _MEASURED / (time.perf_counter() - begin)
