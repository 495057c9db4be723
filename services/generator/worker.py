"""The generator's stages: `prepare` trains the VAE and encodes the sources, `identify` searches one shard of them."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from defuse.errors import Cancelled
from defuse.v1 import run_pb2, work_pb2

from services.generator import label_model, vae, vae_files
from services.generator.search import Counts, Failures, Law, Sources, choose_sources, is_held_out, search
from services.generator.workbench import VAE, PreparedRun, Workbench
from services.runtime import catalog, telemetry
from services.runtime.catalog import LabelledImages
from services.runtime.inference import as_floats
from services.runtime.worker import Job

SEARCHED_SPLIT = "val"
_ENCODE_BATCH = 512
_TRAINING_SHARE = 0.9  # of the progress of `prepare`


def prepare(bench: Workbench, work: work_pb2.PrepareWork, job: Job) -> work_pb2.Event:
    """Train or load the run's VAE and its label model, encode its sources, and store all of it."""
    run = work.run
    train = bench.images(run, "train")
    network = _trained_vae(bench, run, train, job)
    job.progress(_TRAINING_SHARE, "encoding the images", state=run_pb2.Run.STATE_PREPARING)
    prepared = _store_sources(bench, run, network, train, job)
    event = work_pb2.Event(subject=run.name)
    event.prepared.source_count = len(prepared.index)
    return event


def identify(bench: Workbench, work: work_pb2.IdentifyWork, job: Job) -> work_pb2.Event:
    """Search one shard and store its failures; a shard that is stored already is not searched again."""
    run = work.run
    key = catalog.shard_counts(run.name, work.shard)
    if not bench.store.exists(key):
        failures, counts = _search_shard(bench, work, job)
        bench.store.write_arrays(catalog.failures(run.name, work.shard), failures.arrays())
        bench.store.write_message(key, run_pb2.SearchCounts(**asdict(counts)))
    event = work_pb2.Event(subject=run.name)
    event.shard_identified.shard = work.shard
    event.shard_identified.counts.CopyFrom(bench.store.read_message(key, run_pb2.SearchCounts))
    return event


def _trained_vae(bench: Workbench, run: run_pb2.Run, train: LabelledImages, job: Job) -> vae.Vae:
    key = catalog.vae(run.config, VAE)
    if not bench.store.exists(key):
        bench.store.write_bytes(key, vae_files.to_bytes(_train_vae(bench, run, train, job)))
    # What lies in the store is what everybody uses, also where two workers trained it at the same time.
    network, stored = bench.vae(key), bench.store.read_bytes(key)
    for part, export in (("encoder.onnx", vae_files.encoder_onnx), ("decoder.onnx", vae_files.decoder_onnx)):
        if not bench.store.exists(catalog.vae(run.config, part)):
            bench.store.write_bytes(catalog.vae(run.config, part), export(vae_files.from_bytes(stored)))
    return network


def _train_vae(bench: Workbench, run: run_pb2.Run, train: LabelledImages, job: Job) -> vae.Vae:
    try:
        return vae.train_vae(
            train.images,
            _vae_config(run, train),
            seed=run.config.vae.seed,
            device=bench.device,
            on_epoch=_report(job),
            should_stop=job.cancelled,
        )
    except vae.TrainingCancelled as error:
        raise Cancelled(f"{run.name} was cancelled") from error


def _vae_config(run: run_pb2.Run, train: LabelledImages) -> vae.VaeConfig:
    height, width, channels = train.images.shape[1:]
    wanted = run.config.vae
    given = {"latent_dim": wanted.latent_dim, "epochs": wanted.epochs, "beta": wanted.beta}
    overrides = {name: value for name, value in given.items() if value}
    return vae.VaeConfig.for_shape((channels, height, width), len(train.images), **overrides)


def _report(job: Job) -> Callable[[vae.EpochReport], None]:
    def on_epoch(report: vae.EpochReport) -> None:
        job.progress(
            _TRAINING_SHARE * report.epoch / report.epochs,
            f"training the VAE, epoch {report.epoch} of {report.epochs}, ELBO {report.elbo:.1f}",
            state=run_pb2.Run.STATE_PREPARING,
        )

    return on_epoch


def _store_sources(
    bench: Workbench, run: run_pb2.Run, network: vae.Vae, train: LabelledImages, job: Job
) -> PreparedRun:
    config = run.config
    mu, sigma = vae.encode_images(network, train.images, device=bench.device, batch_size=_ENCODE_BATCH)
    job.check_cancelled()
    labels = label_model.train_label_model(
        mu, sigma, train.labels, len(bench.model(run).classes), seed=config.seed, device=bench.device
    )
    searched = bench.images(run, SEARCHED_SPLIT)
    index = choose_sources(seed=config.seed, count=len(searched.labels), limit=config.search.max_sources)
    source_mu, _ = vae.encode_images(network, searched.images[index], device=bench.device, batch_size=_ENCODE_BATCH)
    held_out = is_held_out(seed=config.seed, source=index, fraction=config.search.held_out_fraction)
    prepared = PreparedRun(index=index, mu=source_mu, sd_agg=vae.aggregate_sd(mu), held_out=held_out.astype(np.uint8))
    bench.store.write_bytes(catalog.label_model(run.name), label_model.to_bytes(labels))
    bench.store.write_arrays(catalog.sources(run.name), prepared.arrays())
    return prepared


def _search_shard(bench: Workbench, work: work_pb2.IdentifyWork, job: Job) -> tuple[Failures, Counts]:
    run, prepared = work.run, bench.prepared(work.run)
    shard = slice(work.begin, work.end)
    index = prepared.index[shard]
    searched = bench.images(run, SEARCHED_SPLIT)
    sources = Sources(
        index=index,
        images=as_floats(searched.images[index]),
        labels=searched.labels[index],
        mu=prepared.mu[shard],
        held_out=prepared.held_out[shard],
    )

    def on_batch(_: float) -> None:
        if job.cancelled():
            raise Cancelled(f"{run.name} was cancelled")

    failures, counts = search(sources, _law(run), bench.models(run), on_batch=on_batch)
    telemetry.DECODES.inc(counts.decodes)
    telemetry.FAILURES.inc(counts.failures)
    return failures, counts


def _law(run: run_pb2.Run) -> Law:
    wanted = run.config.search
    return Law(
        seed=run.config.seed,
        radius_sd=wanted.radius_sd,
        draws=wanted.draws_per_source,
        max_failures_per_source=wanted.max_failures_per_source,
        min_label_probability=wanted.min_label_probability,
        batch_size=wanted.batch_size,
    )
