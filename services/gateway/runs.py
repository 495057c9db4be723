"""Runs: their configuration is checked once, their state is a fold over the events of the stages."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence

import numpy as np
from defuse import names
from defuse.errors import AlreadyExists, InvalidInput, NotReady
from defuse.v1 import dataset_pb2, model_pb2, run_pb2, work_pb2
from google.protobuf.message import Message

from services.gateway.book import Book, Work
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog, label_map
from services.runtime.inference import InferenceClient
from services.runtime.queue import DISTILL, IDENTIFY, PREPARE, Queue
from services.runtime.worker import cancel_key

ENDED = (run_pb2.Run.STATE_SUCCEEDED, run_pb2.Run.STATE_FAILED, run_pb2.Run.STATE_CANCELLED)
_CANCEL_MARK_S = 7 * 24 * 3600
_SEARCH_DEFAULTS = run_pb2.SearchConfig(
    radius_sd=0.5,
    draws_per_source=50,
    max_failures_per_source=5,
    min_label_probability=0.9,
    held_out_fraction=0.3,
    shard_size=256,
    batch_size=512,
)
_MIXTURE_DEFAULTS = run_pb2.MixtureConfig(max_components=10, min_support=15, fresh_decodes=200)
# Least and largest value of what a caller may set, for values that are not 0.
_BOUNDS = {
    "search.radius_sd": (1e-6, 3.0),
    "search.draws_per_source": (1, 100_000),
    "search.max_failures_per_source": (1, 100_000),
    "search.min_label_probability": (1e-9, 1 - 1e-9),
    "search.held_out_fraction": (1e-9, 1 - 1e-9),
    "search.max_sources": (1, 2**62),
    "search.shard_size": (1, 1_000_000),
    "search.batch_size": (1, 65_536),
    "mixture.max_components": (1, 1000),
    "mixture.min_support": (2, 1_000_000),
    "mixture.fresh_decodes": (1, 100_000),
    "vae.latent_dim": (2, 256),
    "vae.epochs": (1, 10_000),
    "vae.beta": (1e-6, 1e3),
}


class Runs:
    """Creates, finds, watches and cancels runs."""

    def __init__(self, queue: Queue, store: ArtifactStore, inference: InferenceClient) -> None:
        self._queue = queue
        self._store = store
        self._catalog = Catalog(store)
        self._inference = inference
        self.book: Book[run_pb2.Run] = Book(queue, run_pb2.Run, "runs", lambda run: run.state in ENDED)

    async def create(self, run_id: str, config: run_pb2.RunConfig) -> run_pb2.Run:
        """Check a configuration against the model, the data and the served classifier, and start a run."""
        run = run_pb2.Run(name=names.run(run_id), config=complete(config), state=run_pb2.Run.STATE_PREPARING)
        run.create_time.GetCurrentTime()
        run.update_time.CopyFrom(run.create_time)
        await asyncio.to_thread(self._check, run.config)
        await asyncio.to_thread(self._claim_name, run)
        return await self.book.create(run, (PREPARE, work_pb2.PrepareWork(run=_as_created(run))))

    async def get(self, name: str) -> run_pb2.Run:
        return await self.book.get(names.check(name, "runs/*"))

    async def list(self) -> list[run_pb2.Run]:
        """Return all runs, newest first."""
        return list(reversed(await self.book.list()))

    def watch(self, name: str) -> AsyncIterator[run_pb2.Run]:
        return self.book.watch(names.check(name, "runs/*"))

    async def cancel(self, name: str) -> run_pb2.Run:
        """Stop a run; its workers stop at their next batch."""
        await self.get(name)
        await self._queue.redis.set(cancel_key(name), "1", ex=_CANCEL_MARK_S)
        return await self.apply(work_pb2.Event(subject=name, cancelled=work_pb2.Cancelled()))

    async def apply(self, event: work_pb2.Event) -> run_pb2.Run:
        """Fold an event into the state of its run."""
        return await self.book.apply(event.subject, lambda run: fold(run, event))

    def _claim_name(self, run: run_pb2.Run) -> None:
        """Record the run; take on the record, with the same configuration, of a gateway that died right then."""
        key = catalog.run(run.name)
        if not self._store.exists(key):
            self._store.write_message(key, _as_created(run))
        elif self._store.read_message(key, run_pb2.Run).config != run.config:
            raise AlreadyExists(f"{run.name} exists already; choose another name", reason="RUN_EXISTS")

    def _check(self, config: run_pb2.RunConfig) -> None:
        model = self._catalog.model(config.model)
        dataset = self._catalog.dataset(config.dataset)
        config.model_version = config.model_version or model.champion_version
        _check_fit(model, dataset)
        height, width, channels = model.image_shape
        self._inference.check()
        # One real answer says more than readiness: the version is loaded, and takes what the model declares.
        classifier = self._inference.classifier(model, version=config.model_version)
        classifier.classify(np.zeros((1, channels, height, width), np.float32))


def fold(run: run_pb2.Run, event: work_pb2.Event) -> Sequence[Work]:
    """Change a run by an event, in place; return the work that follows. An event that comes twice changes nothing."""
    if run.state in ENDED:
        return []
    before = run.state
    works: list[tuple[str, Message]] = []
    kind = event.WhichOneof("kind")
    if kind == "progress":
        _on_progress(run, event.progress)
    elif kind == "prepared" and run.state == run_pb2.Run.STATE_PREPARING:
        works = _on_prepared(run, event.prepared)
    elif kind == "shard_identified" and run.state == run_pb2.Run.STATE_IDENTIFYING:
        works = _on_shard(run, event.shard_identified)
    elif kind == "distilled" and run.state == run_pb2.Run.STATE_DISTILLING:
        run.region_count = event.distilled.region_count
        _enter(run, run_pb2.Run.STATE_SUCCEEDED, _summary(run))
    elif kind == "failed":
        run.error = event.failed.error
        _enter(run, run_pb2.Run.STATE_FAILED, "")
    elif kind == "cancelled":
        _enter(run, run_pb2.Run.STATE_CANCELLED, "cancelled")
    if run.state != before:
        run.update_time.GetCurrentTime()
    return works


def complete(config: run_pb2.RunConfig) -> run_pb2.RunConfig:
    """Return a configuration with its defaults filled in; raise InvalidInput that names a value out of its bounds."""
    for path, (least, largest) in _BOUNDS.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        if value and not least <= value <= largest:
            raise InvalidInput(f"{path} is {value}; it must lie between {least} and {largest}", reason="OUT_OF_BOUNDS")
    whole = run_pb2.RunConfig(search=_SEARCH_DEFAULTS, mixture=_MIXTURE_DEFAULTS)
    whole.MergeFrom(config)
    return whole


def _check_fit(model: model_pb2.Model, dataset: dataset_pb2.Dataset) -> None:
    label_map(dataset, model)
    if list(model.image_shape) != list(dataset.image_shape):
        raise InvalidInput(
            f"model {names.last(model.name)!r} takes images of {_shape(model.image_shape)}, the data set has "
            f"{_shape(dataset.image_shape)}; bring images of the model's size",
            reason="IMAGE_SHAPE_MISMATCH",
        )


def _on_progress(run: run_pb2.Run, progress: work_pb2.StageProgress) -> None:
    if progress.state == run.state:
        run.progress = progress.progress
    if progress.state in {run.state, run_pb2.Run.STATE_UNSPECIFIED}:
        run.note = progress.note


def _on_prepared(run: run_pb2.Run, prepared: work_pb2.Prepared) -> list[Work]:
    size, count = run.config.search.shard_size, prepared.source_count
    run.shard_count = math.ceil(count / size)
    decodes = count * run.config.search.draws_per_source
    _enter(run, run_pb2.Run.STATE_IDENTIFYING, f"up to {decodes} perturbations of {count} images")
    created = _as_created(run)
    return [
        (
            IDENTIFY,
            work_pb2.IdentifyWork(run=created, shard=shard, begin=shard * size, end=min((shard + 1) * size, count)),
        )
        for shard in range(run.shard_count)
    ]


def _on_shard(run: run_pb2.Run, done: work_pb2.ShardIdentified) -> list[Work]:
    if done.shard in run.finished_shards:
        return []
    run.finished_shards[:] = sorted([*run.finished_shards, done.shard])
    for field in run_pb2.SearchCounts.DESCRIPTOR.fields:
        total = getattr(run.counts, field.name) + getattr(done.counts, field.name)
        setattr(run.counts, field.name, total)
    run.progress = len(run.finished_shards) / run.shard_count
    run.note = f"{run.counts.failures} failures in {run.counts.decodes} perturbations"
    if len(run.finished_shards) < run.shard_count:
        return []
    _enter(run, run_pb2.Run.STATE_DISTILLING, f"grouping {run.counts.failures} failures")
    return [(DISTILL, work_pb2.DistillWork(run=_as_created(run), shard_count=run.shard_count))]


def _enter(run: run_pb2.Run, state: run_pb2.Run.State.ValueType, note: str) -> None:
    run.state = state
    run.progress = 1.0 if state == run_pb2.Run.STATE_SUCCEEDED else 0.0
    run.note = note


def _summary(run: run_pb2.Run) -> str:
    counts = run.counts
    searched = counts.sources - counts.sources_wrong_on_image - counts.sources_wrong_on_reconstruction
    return (
        f"{run.region_count} regions from {counts.failures} failures: {counts.decodes} perturbations of {searched} "
        f"images at radius {run.config.search.radius_sd:g} sd; {counts.candidates} were misclassified, "
        f"{counts.rejected_by_label_model} of them no longer showed their label"
    )


def _as_created(run: run_pb2.Run) -> run_pb2.Run:
    """Return what never changes of a run: what travels with its work."""
    return run_pb2.Run(name=run.name, config=run.config, create_time=run.create_time)


def _shape(values: Sequence[int]) -> str:
    return "x".join(str(value) for value in values)


def check_distilled(run: run_pb2.Run) -> None:
    """Raise NotReady unless the run's regions lie in the store."""
    if run.state != run_pb2.Run.STATE_SUCCEEDED:
        state = run_pb2.Run.State.Name(run.state).removeprefix("STATE_").lower()
        raise NotReady(
            f"run {names.last(run.name)!r} is {state}; regions are there once it has succeeded",
            reason="RUN_NOT_FINISHED",
        )
