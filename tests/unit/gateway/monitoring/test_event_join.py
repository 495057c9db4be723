"""Events whose other half does not come, and too many that wait, over a real Redis and a real store."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest
from defuse.errors import InvalidInput
from prometheus_client import REGISTRY

from services.gateway.monitoring import event_join as parts_
from services.gateway.monitoring.cloud_events import CloudEvent, event_part
from services.gateway.monitoring.config import MonitoredModels
from services.gateway.monitoring.event_join import EventJoiner, PendingEvents
from services.gateway.monitoring.observation_changes import Deletions
from services.gateway.monitoring.observation_index import ObservationIndex
from services.gateway.monitoring.reports import BatchReports
from services.runtime.queue import KEY, Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.events import TYPES, request_of, response_of
from tests.monitored import MODEL, pictures, plant_model, stored_ids, works
from tests.queues import close_queues
from tests.unit.gateway.monitoring.listening import nobody

SCORES = [[1, 2, 3]]


class House:
    """The event joiner and its dependencies."""

    def __init__(self, queue: Queue, store: ArtifactStore) -> None:
        self.redis, self.model = queue.redis, plant_model(store)
        subjects = MonitoredModels(Catalog(store))
        index = ObservationIndex(queue, lambda batch: asyncio.to_thread(store.exists, keys.batch_record(batch)))
        self.parts = PendingEvents(queue)
        self.observing = EventJoiner(
            self.parts, BatchReports(store, subjects, index, Deletions(store, subjects, index, nobody)), subjects
        )

    async def send(self, event_id: str, half: str) -> None:
        data = request_of(pictures(1), self.model) if half == "request" else response_of(SCORES)
        await self.observing.take(MODEL, CloudEvent(id=event_id, type=TYPES[half], time=None, data=data))

    async def wait_for_long(self) -> None:
        """Let so much time pass that what waits has waited for too long."""
        for key in await self.redis.zrange(f"{KEY}events:waiting", 0, -1):
            await self.redis.zadd(f"{KEY}events:waiting", {key: time.time() - parts_.LONGEST_WAIT_S - 1})


def told(url: str, store: ArtifactStore, story: Callable[[House], Awaitable[None]]) -> None:
    async def tell() -> None:
        queue = Queue(url)
        try:
            await asyncio.wait_for(story(House(queue, store)), 60)
        finally:
            await close_queues(queue)

    asyncio.run(tell())


def given_up(reason: str) -> float:
    labels = {"model": MODEL, "outcome": reason}
    return REGISTRY.get_sample_value("defuse_observations_total", labels) or 0


@pytest.mark.parametrize(("half", "reason"), [("request", "no_response"), ("response", "no_request")])
def test_the_other_half_does_not_come(redis_url: str, store: ArtifactStore, half: str, reason: str) -> None:
    """It is dropped after a while, counted once by its reason; later parts are not waited for."""

    async def story(house: House) -> None:
        before = given_up(reason)
        await house.send("a", half)
        await house.observing.clean_up()
        assert given_up(reason) == before
        await house.wait_for_long()
        await asyncio.gather(house.observing.clean_up(), house.observing.clean_up())
        assert given_up(reason) == before + 1
        for late in TYPES:
            await house.send("a", late)
        assert await house.redis.zcard(f"{KEY}events:waiting") == 0
        assert stored_ids(store) == []

    told(redis_url, store, story)


def test_a_pair_whose_gateway_died(redis_url: str, store: ArtifactStore) -> None:
    """Another one stores it."""

    async def story(house: House) -> None:
        await house.send("a", "request")
        await house.send("a", "response")
        assert len(await house.parts.take_complete()) == 1  # and died
        await house.observing.store_complete()
        assert stored_ids(store) == []
        await house.wait_for_long()
        await house.observing.clean_up()
        await house.observing.store_complete()
        assert stored_ids(store) == ["a-0"]
        assert len(works(redis_url)) == 1

    told(redis_url, store, story)


def test_parts_that_do_not_fit(redis_url: str, store: ArtifactStore) -> None:
    """They are counted, and what came with them is stored, all at once."""

    async def story(house: House) -> None:
        before = given_up("halves_differ")
        data = response_of([*SCORES, *SCORES])
        await house.observing.take(MODEL, CloudEvent(id="a", type=TYPES["response"], time=None, data=data))
        for event_id in "abc":
            await house.send(event_id, "request")
        for event_id in "bc":
            await house.send(event_id, "response")
        await asyncio.gather(house.observing.store_complete(), house.observing.store_complete())
        assert given_up("halves_differ") == before + 2
        assert sorted(stored_ids(store)) == ["b-0", "c-0"]
        assert len(works(redis_url)) == 1
        await house.observing.clean_up()
        assert await house.redis.exists(f"{KEY}events:waiting", f"{KEY}events:whole") == 0

    told(redis_url, store, story)


def test_an_event_that_could_never_be_stored(redis_url: str, store: ArtifactStore) -> None:
    """Its sender is told, and nothing of it waits."""

    async def story(house: House) -> None:
        long_ago = datetime(1969, 12, 31, tzinfo=UTC)
        event = CloudEvent(id="a", type=TYPES["response"], time=long_ago, data=response_of(SCORES))
        with pytest.raises(InvalidInput, match="has a time of -86400 s; give seconds since 1970"):
            await house.observing.take(MODEL, event)
        assert await house.redis.zcard(f"{KEY}events:waiting") == 0

    told(redis_url, store, story)


def test_one_that_is_refused_among_others(redis_url: str, store: ArtifactStore) -> None:
    """It alone is given up, whatever came about since it was taken in; the others are stored."""

    async def story(house: House) -> None:
        before = given_up("model_changed")
        _, batch = event_part(
            CloudEvent(id="b", type=TYPES["response"], time=None, data=response_of(SCORES)), house.model
        )
        del batch.observations[0].scores[2]  # as of a model of two classes
        await house.parts.put(MODEL, "b", "response", batch)
        for event_id in "abc":
            await house.send(event_id, "request")
        for event_id in "ac":
            await house.send(event_id, "response")
        await house.observing.store_complete()
        assert given_up("model_changed") == before + 1
        assert sorted(stored_ids(store)) == ["a-0", "c-0"]
        assert await house.redis.exists(f"{KEY}events:waiting", f"{KEY}events:whole") == 0

    told(redis_url, store, story)


def test_too_many_wait(redis_url: str, store: ArtifactStore) -> None:
    """By number or by size, the oldest go."""

    async def story(house: House) -> None:
        for event_id in "abc":
            await house.send(event_id, "request")
        [first, second, _] = await house.redis.zrange(f"{KEY}events:waiting", 0, -1)
        size = await house.redis.hstrlen(first, "request")
        assert [pair.key.encode() for pair in await house.parts.too_many(most=1)] == [second, first]
        assert [pair.key.encode() for pair in await house.parts.too_many(most_bytes=2 * size)] == [first]
        assert await house.parts.too_many() == []

    told(redis_url, store, story)


def test_waiting_scores_take_space_too(redis_url: str, store: ArtifactStore) -> None:
    """Responses whose requests do not come count as what they are, in bytes."""

    async def story(house: House) -> None:
        for event_id in "abc":
            await house.send(event_id, "response")
        [first, second, third] = await house.redis.zrange(f"{KEY}events:waiting", 0, -1)
        await house.send("c", "request")
        sizes = [await house.redis.hstrlen(third, half) for half in TYPES]
        most_bytes = sum(sizes) + await house.redis.hstrlen(second, "response")
        assert [pair.key.encode() for pair in await house.parts.too_many(most_bytes=most_bytes)] == [first]

    told(redis_url, store, story)
