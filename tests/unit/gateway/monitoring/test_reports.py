"""Batches of dead gateways, over a real Redis and a real store."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import numpy as np
import pytest
from defuse.errors import AlreadyExists, Conflict
from defuse.v1 import monitor_pb2

from services.gateway.monitoring import batches
from services.gateway.monitoring import observation_index as index_
from services.gateway.monitoring.batches import ReceivedBatch
from services.gateway.monitoring.config import MonitoredModel, MonitoredModels
from services.gateway.monitoring.observation_changes import Deletions
from services.gateway.monitoring.observation_index import ObservationIndex
from services.gateway.monitoring.reports import BatchReports
from services.runtime.queue import KEY, Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.monitored import MODEL, batches_in, observation, plant_model, stored_ids, works
from tests.queues import close_queues
from tests.unit.gateway.monitoring.listening import nobody

DAY = timedelta(days=1)
LOST = f"{MODEL}/observations/2026-11-26-14/lost"


class Taking:
    """The batch reports, with their dependencies."""

    def __init__(self, queue: Queue, store: ArtifactStore) -> None:
        self.redis, self.store = queue.redis, store
        self.subjects = MonitoredModels(Catalog(store))
        self.index = ObservationIndex(queue, lambda batch: asyncio.to_thread(store.exists, keys.batch_record(batch)))
        self.deletions = Deletions(store, self.subjects, self.index, nobody)
        self.reports = BatchReports(store, self.subjects, self.index, self.deletions)

    async def subject(self) -> MonitoredModel:
        return await self.subjects.of(MODEL)

    async def report(self, batch_id: str, ids: str) -> int:
        batch = ReceivedBatch(id=batch_id, observations=[observation(one) for one in ids])
        return await self.reports.store(await self.subject(), batch)

    async def grow_old(self, *batches: str) -> None:
        """Let the time pass after which what a gateway had begun is anybody's."""
        for batch in batches:
            await self.redis.delete(f"{KEY}observed:storing:{batch}")
            await self.redis.zadd(f"{KEY}observed:unfinished", {batch: time.time() - index_.LEASE_S - 1})


def told(url: str, store: ArtifactStore, story: Callable[[Taking], Awaitable[None]]) -> None:
    plant_model(store)

    async def tell() -> None:
        queue = Queue(url)
        try:
            await asyncio.wait_for(story(Taking(queue, store)), 60)
        finally:
            await close_queues(queue)

    asyncio.run(tell())


def test_stored_and_never_handed_on(redis_url: str, store: ArtifactStore) -> None:
    """Another gateway hands it on, once, and nothing that is still under way."""

    async def story(taking: Taking) -> None:
        await taking.index.claim(LOST, ["a"], DAY)
        store.write_message(keys.batch_record(LOST), monitor_pb2.ObservationBatch(observations=[{"id": "a"}]))
        await taking.reports.finish_abandoned()
        assert works(redis_url) == []
        await taking.grow_old(LOST)
        for _ in range(2):
            await taking.reports.finish_abandoned()
        assert [work.batch for work in works(redis_url)] == [LOST]

    told(redis_url, store, story)


def test_claimed_and_never_stored(redis_url: str, store: ArtifactStore) -> None:
    """Another batch cannot have its observations while it may still be stored; afterwards it has them."""

    async def story(taking: Taking) -> None:
        await taking.index.claim(LOST, ["a", "b"], DAY)
        with pytest.raises(Conflict, match="batch 'lost', which has some of these observations, is being stored"):
            await taking.report("other", "bc")
        await taking.grow_old(LOST)
        await taking.reports.finish_abandoned()
        assert await taking.report("other", "bc") == 2
        assert works(redis_url)[0].batch == batches_in(store)[0]

    told(redis_url, store, story)


def test_a_claim_that_was_taken_over(redis_url: str, store: ArtifactStore) -> None:
    """A gateway that was silent too long does not store observations of another batch."""

    async def story(taking: Taking) -> None:
        token, _ = await taking.index.claim(LOST, ["a"], DAY)
        await taking.index.check(LOST, token)
        await taking.grow_old(LOST)
        await taking.report("other", "a")
        with pytest.raises(Conflict, match="batch 'lost' is being stored elsewhere"):
            await taking.index.check(LOST, token)

    told(redis_url, store, story)


@pytest.mark.parametrize("ids", ["c", "bc", "abc", "a", ""])
def test_an_id_of_a_batch_with_other_observations(redis_url: str, store: ArtifactStore, ids: str) -> None:
    """It is refused: nothing is stored of what would be lost, and an id of its own stores it."""

    async def story(taking: Taking) -> None:
        await taking.report("one", "ab")
        with pytest.raises(AlreadyExists, match="batch 'one' is stored with other observations; report") as refused:
            await taking.report("one", ids)
        assert refused.value.reason == "BATCH_ID_USED"
        assert stored_ids(store) == ["a", "b"]
        assert await taking.report("two", "c") == 1

    told(redis_url, store, story)


def test_a_batch_again_whose_observations_went_elsewhere(redis_url: str, store: ArtifactStore) -> None:
    """It is the same although another batch had some, and others were deleted; also for a Redis that knows nothing."""

    async def story(taking: Taking) -> None:
        await taking.report("other", "a")
        assert await taking.report("one", "abc") == 2
        await taking.deletions.delete(MODEL, ["b"])
        assert await taking.report("one", "abc") == 1
        await taking.deletions.delete(MODEL, ["a"])
        assert await taking.report("one", "abc") == 1
        await taking.redis.flushall()
        assert await taking.report("one", "abc") == 1

    told(redis_url, store, story)


def test_a_lock_that_was_lost(redis_url: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that worked too long gets a conflict, which its loops survive; a retry succeeds."""
    monkeypatch.setattr(index_, "_LOCK_S", 0.01)

    async def story(taking: Taking) -> None:
        with pytest.raises(Conflict, match=r"work on batch 'lost' took longer than 0\.01 s"):
            async with taking.index.alone(LOST):
                await asyncio.sleep(0.1)
        monkeypatch.undo()
        async with taking.index.alone(LOST):
            pass

    told(redis_url, store, story)


def test_batches_at_the_same_time(redis_url: str, store: ArtifactStore) -> None:
    """Each observation of overlapping batches is stored once; a rejected gateway retries."""

    async def until_stored(taking: Taking, number: int) -> None:
        ids = "".join(chr(ord("a") + (number + step) % 20) for step in range(10))
        while True:
            try:
                await taking.report(f"batch-{number}", ids)
            except Conflict:
                await asyncio.sleep(0)
            else:
                return

    async def story(taking: Taking) -> None:
        await asyncio.gather(*(until_stored(taking, number) for number in range(20)))
        assert sorted(stored_ids(store)) == [chr(ord("a") + letter) for letter in range(20)]

    told(redis_url, store, story)


def test_deleted_while_it_is_stored(redis_url: str, store: ArtifactStore) -> None:
    """Whichever is first, nothing of it is left, and the rest of the batch is there."""

    async def story(taking: Taking) -> None:
        await taking.index.claim(LOST, ["a", "b"], DAY)
        assert await taking.deletions.delete(MODEL, ["b", "never"]) == 1
        # Whoever claimed both before goes on.
        observations = [observation("a"), observation("b")]
        record = monitor_pb2.ObservationBatch(observations=[{"id": "a"}, {"id": "b"}])
        arrays = batches.arrays_of(observations, (await taking.subject()).model)
        store.write_arrays(keys.observed_images(LOST), arrays)
        store.write_message(keys.batch_record(LOST), record)
        await taking.grow_old(LOST)  # and dies
        await taking.reports.finish_abandoned()
        assert stored_ids(store) == ["a"]
        assert len(store.read_arrays(keys.observed_images(LOST))["image"]) == 1

    told(redis_url, store, story)


def test_deletions_and_reports_at_the_same_time(redis_url: str, store: ArtifactStore) -> None:
    """A confirmed deletion leaves nothing, in any order of report and deletion."""

    async def delete_all(taking: Taking) -> list[str]:
        return [letter for letter in "abcdefghij" if await taking.deletions.delete(MODEL, [letter])]

    async def story(taking: Taking) -> None:
        reporting = [taking.report(f"batch-{number}", "abcdefghij"[number : number + 2]) for number in range(0, 10, 2)]
        deleted, *_ = await asyncio.gather(delete_all(taking), *reporting)
        assert sorted(stored_ids(store)) == sorted(set("abcdefghij") - set(deleted))
        for batch in batches_in(store):
            record = store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
            rows = store.read_arrays(keys.observed_images(batch))["id"]
            np.testing.assert_array_equal(rows, batches.digests(one.id for one in record.observations))

    told(redis_url, store, story)
