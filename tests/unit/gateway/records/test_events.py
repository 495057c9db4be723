"""Events: where each is recorded, and that none is lost."""

import asyncio
from typing import Any

import pytest
from defuse.errors import StoreFull
from defuse.v1 import work_pb2

from services.gateway.records import events
from services.gateway.records.events import EventConsumer, _event_key
from services.runtime.queue import EVENTS, MAX_DELIVERIES, Queue, dead_letters
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.queues import close_queues
from tests.unit.gateway.stories import ADAPTIVE, CANCELLED, NAME, Run, failed, identified, planned, progress


def test_every_event_of_a_run_has_a_place_of_its_own() -> None:
    """No event of a run is recorded over another one, however many shards and rounds there are."""
    record_keys = [_event_key(event) for event in [*ADAPTIVE, CANCELLED, failed("x")]]
    assert len(set(record_keys)) == len(ADAPTIVE) + 2


def test_the_same_event_has_the_same_place() -> None:
    """A repeated delivery is recorded once."""
    assert _event_key(identified(3, 2, failures=1)) == _event_key(identified(3, 2, failures=1))
    assert _event_key(planned(2, 40)) == _event_key(planned(2, 40))


def test_the_ends_lie_where_others_look_for_them() -> None:
    """Failure and cancellation of a run are found by their kind."""
    assert _event_key(failed("x")) == keys.event(NAME, "failed")
    assert _event_key(CANCELLED) == keys.event(NAME, "cancelled")


def test_progress_is_not_recorded() -> None:
    """Progress, and an event of nobody, leave nothing behind."""
    assert _event_key(progress(Run.STATE_PREPARING, 0.5)) is None
    assert _event_key(work_pb2.Event(failed=work_pb2.StageFailed())) is None


class CrowdedStore(ArtifactStore):
    """Has no room at first."""

    refusals = 2 * MAX_DELIVERIES

    def write_message(self, key: str, message: Any) -> None:
        if self.refusals:
            self.refusals -= 1
            raise StoreFull("no room")
        super().write_message(key, message)


def test_an_event_waits_for_space(redis_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the store has no room, the event is recorded and counts in the end; it is not given up."""
    monkeypatch.setattr(events, "RETRY_S", 0.02)
    store = CrowdedStore(f"file://{tmp_path}/store")
    counted: list[work_pb2.Event] = []

    class Runs:
        async def apply(self, event: work_pb2.Event) -> None:
            counted.append(event)

    async def story() -> tuple[int, int]:
        queue = Queue(redis_url, claim_after_s=0.05)
        loop = EventConsumer(queue, store, {"runs": Runs().apply})
        await queue.open([EVENTS])
        await queue.send(EVENTS, failed("planted"))
        task = asyncio.create_task(loop.run())
        async with asyncio.timeout(20):
            while (await queue.state(EVENTS)).backlog:
                await asyncio.sleep(0.02)
        task.cancel()
        left = await queue.redis.xlen(dead_letters(EVENTS))
        await close_queues(queue)
        return len(counted), left

    assert asyncio.run(story()) == (1, 0)
    assert store.exists(keys.event(NAME, "failed"))
