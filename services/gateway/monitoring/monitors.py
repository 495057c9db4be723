"""Monitors: the state of each model's traffic, in Redis.

Each batch changes the state once, by compare-and-set.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass

import numpy as np
import redis.exceptions
from defuse import names
from defuse.errors import Conflict, DeadlineExceeded, DefuseError, NotFound, StoreFull, Unavailable
from defuse.v1 import monitor_pb2, work_pb2

from services.gateway.monitoring import observation_changes
from services.gateway.monitoring.alert_runs import AlertRuns
from services.gateway.monitoring.alerts import Alerts, alert_name
from services.gateway.monitoring.config import MonitoredModel, MonitoredModels, retention
from services.gateway.monitoring.monitor_state import ReferenceProfile, ScoredBatch, restart, update_state
from services.runtime import telemetry
from services.runtime.queue import KEY, REDIS_AWAY, Queue
from services.runtime.worker import RETRY_S
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_PENDING = f"{KEY}alerts:pending"
# Observations that are applied at once, which bounds the memory for many classes.
_SLICE = 256
# How soon an alert is raised after its batch is applied, and how long the gateway that began keeps the claim.
_RAISE_EVERY_S, _CLAIM_S = 0.2, 120
State = monitor_pb2.MonitorState


@dataclass(frozen=True, kw_only=True)
class _BatchScores:
    """A scored batch with its guard's reference profile."""

    batch: str
    seen: ScoredBatch
    profile: ReferenceProfile


class Monitors:
    """Applies scored batches to the states of monitors, and raises alerts."""

    def __init__(
        self, queue: Queue, store: ArtifactStore, subjects: MonitoredModels, alerts: Alerts, alert_runs: AlertRuns
    ) -> None:
        self._redis = queue.redis
        self._store = store
        self._subjects = subjects
        self._alerts = alerts
        self._alert_runs = alert_runs

    async def get(self, model_name: str) -> monitor_pb2.Monitor:
        """Return the monitor of a model; raise NotFound for an unknown name."""
        subject = await self._subjects.of(model_name)
        state = _parse(await self._redis.get(_key(model_name, "state")))
        monitor = state.monitor
        monitor.name, monitor.guard = f"{model_name}/monitor", monitor.guard or subject.guard
        monitor.config.CopyFrom(subject.config)
        monitor.right, monitor.truths = observation_changes.total_counts(await self._kept_truth(model_name))
        return monitor

    async def apply(self, event: work_pb2.Event) -> None:
        """Apply the event of a scored batch.

        A batch that was applied before, or deleted meanwhile, changes nothing.
        """
        if event.HasField("failed"):
            telemetry.log().error("batch_not_scored", model=event.subject, error=event.failed.error)
        if not event.HasField("watched"):
            return
        subject = await self._subjects.of(event.subject)
        await self.count_truth(subject, event.watched.batch)
        scores = await asyncio.to_thread(self._read_scores, subject, event.watched) if event.watched.guard else None
        if scores:
            await self._apply_scores(subject, scores)

    async def run(self) -> None:
        """Raise alerts of applied batches until the task is cancelled."""
        while True:
            try:
                await self.raise_pending()
            except (DefuseError, OSError, *REDIS_AWAY) as error:
                telemetry.log().warning("alerts_retried", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(_RAISE_EVERY_S)

    async def count_truth(self, subject: MonitoredModel, batch: str) -> None:
        """Recount a batch's correct predictions, over its observations with truth."""
        counts = await asyncio.to_thread(observation_changes.truth_counts, self._store, batch, subject.model.classes)
        key = _key(subject.model.name, "truth")
        if not counts:
            await self._redis.hdel(key, batch)
            return
        kept_until = time.time() + retention(subject.config).total_seconds()
        await self._redis.hset(key, batch, f"{counts} {kept_until:.0f}")

    async def _kept_truth(self, model_name: str) -> list[bytes]:
        """Return the truth counts of kept batches; drop the others."""
        key = _key(model_name, "truth")
        counted = await self._redis.hgetall(key)
        past = [batch for batch, count in counted.items() if float(count.split()[-1]) < time.time()]
        if past:
            await self._redis.hdel(key, *past)
        return [count for batch, count in counted.items() if batch not in past]

    async def raise_pending(self) -> None:
        """Raise alerts of applied batches, including those of gateways that died.

        Each alert already has its name. One of several gateways raises it; the others wait until that gateway's claim
        expires.
        """
        for data in await self._redis.lrange(_PENDING, 0, -1):
            alert = monitor_pb2.Alert.FromString(data)
            claim = f"{_PENDING}:{alert.name}"
            if not await self._redis.set(claim, 1, nx=True, ex=_CLAIM_S):
                continue
            try:
                model_name = names.parent(alert.name)
                raised = await self._alerts.raise_(model_name, alert)
                await self._start_run(await self._subjects.of(model_name), raised)
            except BaseException:
                await self._redis.delete(claim)
                raise
            await self._redis.lrem(_PENDING, 1, data)

    async def _start_run(self, subject: MonitoredModel, alert: monitor_pb2.Alert) -> None:
        if not subject.config.start_runs or alert.kind != monitor_pb2.Alert.KIND_REGION_HITS or alert.run:
            return
        try:
            await self._alert_runs.start(alert.name)
        except (Unavailable, DeadlineExceeded, StoreFull, Conflict):
            raise  # it is tried again
        except DefuseError as error:
            telemetry.log().warning("no_alert_run", alert=alert.name, reason=error.reason, error=error.message)

    async def _apply_scores(self, subject: MonitoredModel, scores: _BatchScores) -> None:
        name = subject.model.name
        state_key, folded_key = _key(name, "state"), _key(name, f"folded:{scores.batch}")
        while True:
            async with self._redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(state_key, folded_key)
                    if await pipe.exists(folded_key):
                        return
                    state = _parse(await pipe.get(state_key))
                    alerts = await asyncio.to_thread(_changed, state, subject, scores)
                    pipe.multi()
                    pipe.set(state_key, state.SerializeToString())
                    pipe.set(folded_key, 1, ex=retention(subject.config))
                    for alert in alerts:
                        pipe.rpush(_PENDING, alert.SerializeToString())
                    await pipe.execute()
                except redis.exceptions.WatchError:
                    continue
                _export_metrics(name, scores)
                return

    def _read_scores(self, subject: MonitoredModel, watched: work_pb2.Watched) -> _BatchScores | None:
        try:
            arrays = self._store.read_arrays(keys.observation_scores(watched.batch))
            record = self._store.read_message(keys.batch_record(watched.batch), monitor_pb2.ObservationBatch)
        except NotFound:
            return None
        versions = {keys.observation_digest(one.id): one.version for one in record.observations}
        profile = ReferenceProfile(
            guard=self._subjects.catalog.guard(watched.guard),
            classes=subject.model.classes,
            arrays=self._store.read_arrays(keys.guard_reference(watched.guard)),
        )
        answered_by = [versions.get(row.tobytes(), "") for row in arrays["id"]]
        return _BatchScores(batch=watched.batch, seen=ScoredBatch(arrays=arrays, versions=answered_by), profile=profile)


def _changed(state: State, subject: MonitoredModel, scores: _BatchScores) -> list[monitor_pb2.Alert]:
    """Apply a batch to a state, in place, and return named alerts."""
    guard = scores.profile.guard.name
    if _number(guard) < _number(state.monitor.guard):
        return []  # scored by a guard that was replaced meanwhile
    if guard != state.monitor.guard:
        restart(state, scores.profile)
    alerts = [
        alert
        for begin in range(0, len(scores.seen.versions), _SLICE)
        for alert in update_state(
            state,
            scores.seen.part(begin, begin + _SLICE),
            scores.profile,
            expected_run_length=subject.config.expected_run_length,
        )
    ]
    for number, alert in enumerate(alerts):
        alert.create_time.GetCurrentTime()
        alert.name = alert_name(
            subject.model.name, alert, hashlib.sha256(f"{scores.batch} {number}".encode()).hexdigest()[:6]
        )
    return alerts


def _export_metrics(model: str, scores: _BatchScores) -> None:
    """Add a batch's hits to the Prometheus metrics."""
    inside = scores.seen.arrays["index"][scores.seen.arrays["inside"] > 0]
    for number, hits in enumerate(np.bincount(inside, minlength=len(scores.profile.guard.regions)).tolist()):
        region = scores.profile.guard.regions[number].region
        telemetry.REGION_HITS.labels(names.last(model), region.removeprefix("runs/").replace("/regions/", " ")).inc(
            hits
        )


def _number(guard: str) -> int:
    return int(names.last(guard)) if guard else 0


def _parse(data: bytes | None) -> State:
    return State.FromString(data) if data else State()


def _key(model_name: str, what: str) -> str:
    return f"{KEY}monitor:{model_name}:{what}"
