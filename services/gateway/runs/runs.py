"""Runs: their creation, and their state, which follows the stages' events."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence

import numpy as np
from defuse import names
from defuse.errors import AlreadyExists, InvalidInput, NotFound, NotReady
from defuse.v1 import model_pb2, run_pb2, work_pb2
from google.protobuf.message import Message

from services.gateway.records.paging import Cursor, Page
from services.gateway.records.store import RecordStore, Work
from services.gateway.runs.config import ThresholdAdvisor, complete, with_advised_thresholds
from services.runtime.queue import DISTILL, IDENTIFY, PLAN, PREPARE, Queue
from services.runtime.worker import CANCEL_MARK_S, cancel_key
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, check_fit, format_shape
from services.triton.client import InferenceClient

ENDED = (run_pb2.Run.STATE_SUCCEEDED, run_pb2.Run.STATE_FAILED, run_pb2.Run.STATE_CANCELLED)


class Runs:
    """Creates, finds, watches and cancels runs."""

    def __init__(
        self, queue: Queue, store: ArtifactStore, inference: InferenceClient, threshold_advisor: ThresholdAdvisor
    ) -> None:
        self._queue = queue
        self._threshold_advisor = threshold_advisor
        self._store = store
        self._catalog = Catalog(store)
        self._inference = inference
        self.records: RecordStore[run_pb2.Run] = RecordStore(queue, run_pb2.Run, "runs", lambda run: run.state in ENDED)

    async def create(self, run_id: str, config: run_pb2.RunConfig) -> run_pb2.Run:
        """Start a run, after a check of configuration, data and served classifier."""
        name = names.run(names.check_id("run", run_id, field="run_id"))
        run = run_pb2.Run(
            name=name,
            config=await self.checked(config),
            state=run_pb2.Run.STATE_PREPARING,
            operation=names.search_operation(name),
        )
        run.create_time.GetCurrentTime()
        run.update_time.CopyFrom(run.create_time)
        await asyncio.to_thread(self._store_run_record, run)
        return await self.records.create(run, [(PREPARE, work_pb2.PrepareWork(run=_as_created(run)))])

    async def checked(self, config: run_pb2.RunConfig) -> run_pb2.RunConfig:
        """Return a complete, checked configuration.

        It has defaults, versions and advised thresholds. The thresholds are resolved here because later annotations
        must not change a run.
        """
        whole = complete(await self._advised(config) if config.validity_from else config)
        await asyncio.to_thread(self._check, whole)
        return whole

    async def get(self, name: str) -> run_pb2.Run:
        return await self.records.get(names.check(name, "runs/*"))

    async def get_distilled(self, name: str) -> run_pb2.Run:
        """Return a run whose regions are in the store.

        Raises NotReady for any other run.
        """
        run = await self.get(name)
        check_distilled(run)
        return run

    async def page(self, cursor: Cursor) -> Page[run_pb2.Run]:
        """Return one page of all runs, newest first."""
        return await cursor.page_of(self.records.iterate_after("", cursor.after, newest_first=True))

    def watch(self, name: str) -> AsyncIterator[run_pb2.Run]:
        return self.records.watch(names.check(name, "runs/*", field="name"))

    async def cancel(self, name: str) -> run_pb2.Run:
        """Cancel a run; its workers stop at their next batch."""
        if (run := await self.get(name)).state in ENDED:
            return run
        event = work_pb2.Event(subject=name, cancelled=work_pb2.Cancelled())
        await asyncio.to_thread(self._store.write_message, keys.event(name, "cancelled"), event)
        await self._queue.redis.set(cancel_key(name), "1", ex=CANCEL_MARK_S)
        return await self.apply(event)

    async def apply(self, event: work_pb2.Event) -> run_pb2.Run:
        """Apply an event to the state of its run."""
        return await self.records.update(event.subject, lambda run: apply_event(run, event))

    async def _advised(self, config: run_pb2.RunConfig) -> run_pb2.RunConfig:
        other = await self.get(config.validity_from)
        check_distilled(other)
        return with_advised_thresholds(config, await self._threshold_advisor.of(other), other)

    def _store_run_record(self, run: run_pb2.Run) -> None:
        """Store the run's record, unless an equal one exists.

        A gateway that died at this point leaves an equal record. Raises AlreadyExists for another one.
        """
        key = keys.run(run.name)
        if not self._store.exists(key):
            self._store.write_message(key, _as_created(run))
        elif self._store.read_message(key, run_pb2.Run).config != run.config:
            raise AlreadyExists(f"{run.name} exists already; choose another name", reason="RUN_EXISTS")

    def _check(self, config: run_pb2.RunConfig) -> None:
        model = self._catalog.model(config.model)
        config.model_version = config.model_version or model.champion_version
        check_fit(model, self._catalog.dataset(config.dataset))
        self._check_pair(config.vae)
        self._inference.check()
        self._check_served(model, config.model_version)
        if config.validity.oracle:
            oracle = self._catalog.model(config.validity.oracle)
            config.validity.oracle_version = config.validity.oracle_version or oracle.champion_version
            _check_oracle(oracle, model)
            if (oracle.name, config.validity.oracle_version) == (model.name, config.model_version):
                raise InvalidInput(
                    f"the oracle is version {config.model_version} of {names.last(model.name)!r}, the model under "
                    "test, which agrees with itself; name a second, stronger model",
                    reason="UNFIT_ORACLE",
                )
            self._check_served(oracle, config.validity.oracle_version)

    def _check_served(self, model: model_pb2.Model, version: int) -> None:
        """Check that a version is loaded and takes its declared input.

        It classifies one image, which proves more than a readiness check.
        """
        height, width, channels = model.image_shape
        classifier = self._inference.classifier(model, version=version)
        classifier.classify(np.zeros((1, channels, height, width), np.float32))

    def _check_pair(self, vae: run_pb2.VaeConfig) -> None:
        if bool(vae.encoder_digest) != bool(vae.decoder_digest):
            raise InvalidInput("an encoder and a decoder are given together or not at all", reason="UNFIT_VAE")
        for digest in filter(None, (vae.encoder_digest, vae.decoder_digest)):
            if not self._store.exists(keys.file(digest)):
                raise NotFound(f"no file {digest} was uploaded; upload the ONNX file first", reason="FILE_NOT_FOUND")


def apply_event(run: run_pb2.Run, event: work_pb2.Event) -> Sequence[Work]:
    """Apply an event to a run, in place, and return its work.

    The work is that of the next stage or round. Applying an event twice has the same effect as applying it once.
    """
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
    elif kind == "round_planned" and run.state == run_pb2.Run.STATE_IDENTIFYING:
        works = _on_plan(run, event.round_planned)
    elif kind == "distilled" and run.state == run_pb2.Run.STATE_DISTILLING:
        run.region_count = event.distilled.region_count
        run.groups.CopyFrom(event.distilled.counts)
        _enter(run, run_pb2.Run.STATE_SUCCEEDED, _summary(run))
    elif kind == "failed":
        run.error, run.error_reason = event.failed.error, event.failed.reason
        _enter(run, run_pb2.Run.STATE_FAILED, "")
    elif kind == "cancelled":
        _enter(run, run_pb2.Run.STATE_CANCELLED, "cancelled")
    if run.state != before:
        run.update_time.GetCurrentTime()
    return works


def _check_oracle(oracle: model_pb2.Model, model: model_pb2.Model) -> None:
    if list(oracle.classes) != list(model.classes) or list(oracle.image_shape) != list(model.image_shape):
        raise InvalidInput(
            f"oracle {names.last(oracle.name)!r} reads {len(oracle.classes)} classes in images of "
            f"{format_shape(oracle.image_shape)}, the model {len(model.classes)} in {format_shape(model.image_shape)}; "
            "classes, in their order, and images must be the same",
            reason="UNFIT_ORACLE",
        )


def _on_progress(run: run_pb2.Run, progress: work_pb2.StageProgress) -> None:
    if progress.state == run.state:
        run.progress = progress.progress
    if progress.state in {run.state, run_pb2.Run.STATE_UNSPECIFIED}:
        run.note = progress.note


def _on_prepared(run: run_pb2.Run, prepared: work_pb2.Prepared) -> list[Work]:
    run.shard_count = math.ceil(prepared.source_count / run.config.search.shard_size)
    run.preflight.CopyFrom(prepared.preflight)
    if prepared.HasField("config"):
        run.config.CopyFrom(prepared.config)
    decodes = prepared.source_count * run.config.search.draws_per_source
    _enter(run, run_pb2.Run.STATE_IDENTIFYING, f"up to {decodes} perturbations of {prepared.source_count} images")
    return _shards(run)


def _shards(run: run_pb2.Run) -> list[Work]:
    """Return the work of the present round."""
    created = _as_created(run)
    return [
        (IDENTIFY, work_pb2.IdentifyWork(run=created, shard=shard, round=run.round)) for shard in range(run.shard_count)
    ]


def _on_plan(run: run_pb2.Run, planned: work_pb2.RoundPlanned) -> list[Work]:
    if planned.round != run.round + 1 or len(run.finished_shards) < run.shard_count:
        return []
    if planned.decodes == 0:
        return _distill(run)
    run.round = planned.round
    run.finished_shards[:] = []
    return _shards(run)


def _on_shard(run: run_pb2.Run, done: work_pb2.ShardIdentified) -> list[Work]:
    if done.round != run.round or done.shard in run.finished_shards:
        return []
    run.finished_shards[:] = sorted([*run.finished_shards, done.shard])
    for field in run_pb2.SearchCounts.DESCRIPTOR.fields:
        total = getattr(run.counts, field.name) + getattr(done.counts, field.name)
        setattr(run.counts, field.name, total)
    rounds = _rounds(run)
    run.progress = (run.round + len(run.finished_shards) / run.shard_count) / rounds
    run.note = (
        f"round {run.round + 1} of {rounds}: {run.counts.failures} failures in {run.counts.decodes} perturbations"
    )
    if len(run.finished_shards) < run.shard_count:
        return []
    if run.round + 1 == rounds:
        return _distill(run)
    work = work_pb2.PlanWork(run=_as_created(run), round=run.round + 1, shard_count=run.shard_count)
    return [(PLAN, work)]


def _rounds(run: run_pb2.Run) -> int:
    """Return the largest number of rounds of a run."""
    search = run.config.search
    return 1 if search.strategy == run_pb2.SearchConfig.STRATEGY_UNIFORM else search.rounds


def _distill(run: run_pb2.Run) -> list[Work]:
    _enter(run, run_pb2.Run.STATE_DISTILLING, f"grouping {run.counts.failures} failures")
    work = work_pb2.DistillWork(run=_as_created(run), shard_count=run.shard_count, round_count=run.round + 1)
    return [(DISTILL, work)]


def _enter(run: run_pb2.Run, state: run_pb2.Run.State.ValueType, note: str) -> None:
    run.state = state
    run.progress = 1.0 if state == run_pb2.Run.STATE_SUCCEEDED else 0.0
    run.note = note


def _summary(run: run_pb2.Run) -> str:
    counts = run.counts
    searched = counts.sources - counts.sources_wrong_on_image - counts.sources_wrong_on_reconstruction
    limited = counts.rejected_by_source_limit
    dropped = counts.candidates - counts.failures - limited
    return (
        f"{run.region_count} regions from {counts.failures} failures: {counts.decodes} perturbations of {searched} "
        f"images at radius {run.config.search.radius_sd:g} sd in {_times(run.round + 1, 'round')}; {counts.candidates} "
        f"were misclassified, {dropped} of them not valid or not confirmed, {limited} beyond the limit of failures of "
        f"one image; of {_times(run.groups.groups, 'group')} {run.groups.below_support} had too few failures and "
        f"{run.groups.not_worse_than_control} were no worse than their controls"
    )


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _as_created(run: run_pb2.Run) -> run_pb2.Run:
    """Return the immutable part of a run, which its work messages carry."""
    return run_pb2.Run(name=run.name, config=run.config, create_time=run.create_time)


def check_distilled(run: run_pb2.Run) -> None:
    """Raise NotReady unless the run's regions are in the store."""
    if run.state != run_pb2.Run.STATE_SUCCEEDED:
        state = run_pb2.Run.State.Name(run.state).removeprefix("STATE_").lower()
        raise NotReady(
            f"run {names.last(run.name)!r} is {state}; regions are there once it has succeeded",
            reason="RUN_NOT_FINISHED",
        )
