"""The monitor of a model over a real Redis and a store; the distiller's work is laid there by hand."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defuse.errors import NotFound, Unavailable
from defuse.v1 import guard_pb2, model_pb2, monitor_pb2, release_pb2, work_pb2
from defuse.v1 import monitor_service_pb2 as pb

from services.gateway.monitoring.alerts import Alerts, Webhooks
from services.gateway.monitoring.config import MonitoredModels
from services.gateway.monitoring.monitors import Monitors
from services.gateway.records.paging import Cursor
from services.runtime.queue import Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.queues import close_queues
from tests.unit.gateway.monitoring.test_monitor_state import CLASSES, REGIONS, profile, traffic

MODEL = "models/m"


class Runs:
    """Remembers which alerts were to start a run."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.away = False

    async def start(self, alert: str) -> None:
        if self.away:
            raise Unavailable("Triton is away")
        self.started.append(alert)


class World:
    """A model with a guard whose calm is known."""

    def __init__(self, root: Path) -> None:
        self.store = ArtifactStore(f"file://{root}/store")
        self.runs = Runs()
        self._batches = 0
        self.store.write_message(keys.model(MODEL), model_pb2.Model(name=MODEL, classes=CLASSES))
        self.store.write_message(f"{keys.releases(MODEL)}/1.pb", release_pb2.Release(model=MODEL, version=1))
        self.guard("1")

    def guard(self, number: str) -> None:
        guard = guard_pb2.Guard()
        guard.CopyFrom(profile().guard)
        guard.name = f"{MODEL}/guards/{number}"
        self.store.write_message(keys.guard(guard.name), guard)
        self.store.write_arrays(keys.guard_reference(guard.name), dict(profile().arrays))

    def configure(self, **config: Any) -> None:
        whole = monitor_pb2.MonitorConfig(**{"expected_run_length": 10_000, **config})
        whole.retention.FromSeconds(3600)
        self.store.write_message(keys.monitor_config(MODEL), whole)

    def batch(self, count: int = 200, *, guard: str = "1", **seen: Any) -> work_pb2.Event:
        """Lay a batch that was looked at; return what the distiller says of it."""
        self._batches += 1
        key = f"{MODEL}/observations/2026-11-26-14/b{self._batches}"
        ids = [f"{self._batches}-{number}" for number in range(count)]
        rows = [keys.observation_digest(one) for one in ids]
        arrays = {**traffic(count, seed=self._batches, **seen).arrays, "id": np.frombuffer(b"".join(rows), np.uint8)}
        arrays["id"] = arrays["id"].reshape(count, 16)
        self.store.write_arrays(keys.observation_scores(key), arrays)
        record = monitor_pb2.ObservationBatch(
            observations=[monitor_pb2.Observation(id=one, version="1") for one in ids]
        )
        self.store.write_message(keys.batch_record(key), record)
        event = work_pb2.Event(subject=MODEL)
        event.watched.batch, event.watched.guard = key, f"{MODEL}/guards/{guard}"
        return event


Story = Callable[[Monitors, Alerts], Awaitable[Any]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.configure()
    return world


@pytest.fixture
def told(world: World, redis_url: str) -> Callable[[Story], Any]:
    """Tell a story to a monitor and its alerts; return what it returns."""

    def tell(story: Story) -> Any:
        async def run() -> Any:
            queue = Queue(redis_url)
            subjects = MonitoredModels(Catalog(world.store))
            alerts = Alerts(queue, world.store, subjects, Webhooks())
            try:
                return await story(Monitors(queue, world.store, subjects, alerts, world.runs), alerts)  # type: ignore[arg-type]
            finally:
                await close_queues(queue)

        return asyncio.run(run())

    return tell


async def listed(alerts: Alerts) -> list[monitor_pb2.Alert]:
    page = await alerts.page(MODEL, Cursor.of(pb.ListAlertsRequest(model=MODEL), MODEL))
    return list(page.entries)


def test_a_batch_counts_once(world: World, told: Any) -> None:
    """A batch that comes again changes nothing; another one adds to it."""

    async def story(monitors: Monitors, _: Alerts) -> None:
        first = world.batch()
        for _ in range(3):
            await monitors.apply(first)
        assert (await monitors.get(MODEL)).observations == 200
        await monitors.apply(world.batch())
        monitor = await monitors.get(MODEL)
        assert (monitor.observations, dict(monitor.versions)) == (400, {"1": 400})
        assert (monitor.name, monitor.guard) == (f"{MODEL}/monitor", f"{MODEL}/guards/1")
        assert monitor.config.expected_run_length == 10_000

    told(story)


def test_traffic_that_moves_raises_one_alert_with_a_run(world: World, told: Any) -> None:
    """The alert is kept under a name of its own, is in the list once, and starts the run that was asked for."""
    world.configure(start_runs=True)

    async def story(monitors: Monitors, alerts: Alerts) -> list[monitor_pb2.Alert]:
        await monitors.apply(world.batch())
        moved = world.batch(400, rates=(0.02, 0.4))
        for _ in range(2):
            await monitors.apply(moved)
            await monitors.raise_pending()
        return await listed(alerts)

    [alert] = told(story)
    assert (alert.kind, alert.subject) == (monitor_pb2.Alert.KIND_REGION_HITS, REGIONS[1])
    assert world.runs.started == [alert.name]


def test_an_alert_outlives_the_gateway_that_folded(world: World, told: Any) -> None:
    """Killed between the fold and the alert, the next gateway raises it."""
    moved = world.batch(400, rates=(0.02, 0.4))

    async def killed(monitors: Monitors, alerts: Alerts) -> None:
        async def dies(*_: Any) -> None:
            raise KeyboardInterrupt

        alerts.raise_ = dies  # type: ignore[assignment,method-assign]
        await monitors.apply(moved)
        with pytest.raises(KeyboardInterrupt):
            await monitors.raise_pending()

    async def next_one(monitors: Monitors, alerts: Alerts) -> list[monitor_pb2.Alert]:
        await monitors.apply(moved)  # is delivered again
        await monitors.raise_pending()
        return await listed(alerts)

    told(killed)
    assert len(told(next_one)) == 1


def test_a_new_guard_begins_anew(world: World, told: Any) -> None:
    """Late scores of a replaced guard are left out."""

    async def story(monitors: Monitors, _: Alerts) -> None:
        await monitors.apply(world.batch())
        world.guard("2")
        await monitors.apply(world.batch(100, guard="2"))
        assert (await monitors.get(MODEL)).observations == 100
        await monitors.apply(world.batch(50, guard="1"))
        assert (await monitors.get(MODEL)).observations == 100

    told(story)


def test_truth_is_counted_once(world: World, told: Any) -> None:
    """Said twice, and by a batch folded twice, it counts once; the last word counts."""

    async def story(monitors: Monitors, _: Alerts) -> None:
        event = world.batch(4, predicted=np.array([0, 0, 1, 1]))
        await monitors.apply(event)
        batch = event.watched.batch
        said = [("1-0", CLASSES[0]), ("1-1", CLASSES[1]), ("1-2", CLASSES[1])]
        words = [said, [("1-1", CLASSES[0])]]
        for number, word in enumerate(words):
            message = monitor_pb2.ObservationBatch(
                observations=[monitor_pb2.Observation(id=one, truth=truth) for one, truth in word]
            )
            world.store.write_message(f"{keys.truths(batch)}/{number}.pb", message)
            subject = await MonitoredModels(Catalog(world.store)).of(MODEL)
            for _ in range(2):
                await monitors.count_truth(subject, batch)
        monitor = await monitors.get(MODEL)
        assert (monitor.right, monitor.truths) == (3, 3)

    told(story)


def test_a_batch_that_was_deleted_meanwhile(world: World, told: Any) -> None:
    async def story(monitors: Monitors, _: Alerts) -> None:
        event = world.batch()
        world.store.remove(keys.batch_record(event.watched.batch))
        await monitors.apply(event)
        assert (await monitors.get(MODEL)).observations == 0

    told(story)


def test_a_model_that_is_not_there(told: Any) -> None:
    async def story(monitors: Monitors, _: Alerts) -> None:
        with pytest.raises(NotFound):
            await monitors.get("models/nobody")

    told(story)


def test_a_run_that_cannot_be_started_now(world: World, told: Any) -> None:
    """While Triton is away the alert is there, and its run is started once it is back."""
    world.configure(start_runs=True)

    async def story(monitors: Monitors, alerts: Alerts) -> None:
        await monitors.apply(world.batch(400, rates=(0.02, 0.4)))
        world.runs.away = True
        with pytest.raises(Unavailable):
            await monitors.raise_pending()
        assert len(await listed(alerts)) == 1
        world.runs.away = False
        await monitors.raise_pending()

    told(story)
    assert len(world.runs.started) == 1


def test_truth_of_what_is_no_longer_kept(world: World, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with its batch."""

    async def story(monitors: Monitors, _: Alerts) -> None:
        event = world.batch(4, predicted=np.array([0, 0, 1, 1]))
        await monitors.apply(event)
        said = monitor_pb2.ObservationBatch(observations=[monitor_pb2.Observation(id="1-0", truth=CLASSES[0])])
        world.store.write_message(f"{keys.truths(event.watched.batch)}/0.pb", said)
        await monitors.count_truth(await MonitoredModels(Catalog(world.store)).of(MODEL), event.watched.batch)
        assert (await monitors.get(MODEL)).truths == 1
        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
        assert (await monitors.get(MODEL)).truths == 0

    told(story)
