"""Releases as they go on, as two gateways see them, over a real Redis; only the corrector is not there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from defuse.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    DefuseError,
    Internal,
    InvalidInput,
    NotReady,
    Unavailable,
    to_status,
)
from defuse.v1 import correction_pb2, release_pb2, work_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.corrections.corrections import Corrections
from services.gateway.releases.releases import ReleaseOperations, apply_event
from services.runtime.queue import PUBLISH, Queue
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.queues import close_queues

Correction, Publication = correction_pb2.Correction, release_pb2.Publication
ONE, TWO, UNFINISHED = (f"runs/first/corrections/c{number}" for number in (1, 2, 3))
NAME = "models/tiny/publications/one"
RELEASE = release_pb2.Release(model="models/tiny", version=2, correction=ONE)


class House:
    """Two gateways, and what they did to candidates."""

    def __init__(self, queues: list[Queue], store: ArtifactStore) -> None:
        self.redis = queues[0].redis
        self.retired: list[str] = []
        self.refusal: DefuseError | None = None
        # Runs and regions are not asked.
        self.corrections = Corrections(queues[0], Catalog(store), None, None)  # type: ignore[arg-type]
        self.gateways = [ReleaseOperations(queue, self.corrections, self.retire) for queue in queues]

    async def retire(self, model: str) -> None:
        if self.refusal:
            raise self.refusal
        self.retired.append(model)

    async def asked(self) -> list[release_pb2.Publication]:
        """Return what correctors are asked to publish."""
        entries = await self.redis.xrange(PUBLISH)
        return [work_pb2.PublishWork.FromString(entry[b"payload"]).publication for _, entry in entries]

    def release(self, gateway: int = 0, **fields: str) -> "asyncio.Task[release_pb2.Release]":
        request = pb.ReleaseCorrectionRequest(**{"name": ONE, "request_id": "one", "actor": "ann", **fields})
        return asyncio.create_task(self.gateways[gateway].released(request))  # type: ignore[arg-type]

    async def begun(self, count: int = 1) -> None:
        while len(await self.asked()) < count:
            await asyncio.sleep(0.01)


def told(url: str, store: ArtifactStore, story: Callable[[House], Awaitable[Any]]) -> None:
    async def tell() -> None:
        queues = [Queue(url), Queue(url)]
        house = House(queues, store)
        for name in (ONE, TWO, UNFINISHED):
            state = Correction.STATE_RUNNING if name == UNFINISHED else Correction.STATE_SUCCEEDED
            await house.corrections.records.create(Correction(name=name, model="models/tiny", state=state), [])
        try:
            await asyncio.wait_for(story(house), 60)
        finally:
            await close_queues(*queues)

    asyncio.run(tell())


def published(name: str = NAME) -> work_pb2.Event:
    return work_pb2.Event(subject=name, published=work_pb2.Published(release=RELEASE))


def failed(error: DefuseError, name: str = NAME) -> work_pb2.Event:
    said = work_pb2.StageFailed(error=error.message, reason=error.reason, code=to_status(error).code)
    return work_pb2.Event(subject=name, failed=said)


def test_a_release_from_its_beginning_to_its_end(redis_url: str, store: ArtifactStore) -> None:
    """A corrector is asked once, with actor and reason; all callers get the release, after candidates are retired."""

    async def story(house: House) -> None:
        waiting = house.release(reason="bold sevens", approver="bea")
        await house.begun()
        [asked] = await house.asked()
        assert (asked.name, asked.correction) == (NAME, ONE)
        assert (asked.actor, asked.reason, asked.approver) == ("ann", "bold sevens", "bea")
        await house.gateways[1].apply(
            work_pb2.Event(subject=NAME, progress=work_pb2.StageProgress(progress=0.1, note="checking the candidate"))
        )
        assert (await house.gateways[0].get(NAME)).note == "checking the candidate"
        assert not waiting.done()
        await house.gateways[1].apply(published())
        assert await waiting == RELEASE
        assert house.retired == ["models/tiny"]

    told(redis_url, store, story)


def test_a_lost_connection(redis_url: str, store: ArtifactStore) -> None:
    """The release goes on; the same request waits for it again at any gateway, also when it has ended."""

    async def story(house: House) -> None:
        lost = house.release()
        await house.begun()
        lost.cancel()
        again = house.release(1)
        await house.gateways[1].apply(published())
        assert await again == await house.release() == RELEASE
        assert len(await house.asked()) == 1

    told(redis_url, store, story)


@pytest.mark.parametrize(
    "error",
    [NotReady("too bad", reason="GATE_NOT_PASSED"), InvalidInput("unfit"), AlreadyExists("done"), Internal("?")],
)
def test_what_the_corrector_refuses(redis_url: str, store: ArtifactStore, error: DefuseError) -> None:
    """It is raised as it was meant, again for the same request; candidates stay, and the next release may begin."""

    async def story(house: House) -> None:
        waiting = house.release()
        await house.begun()
        await house.gateways[1].apply(failed(error))
        for refused in (waiting, house.release()):
            with pytest.raises(type(error), match=error.message.replace("?", r"\?")) as caught:
                await refused
            assert caught.value.reason == error.reason
        assert house.retired == []
        another = house.release(request_id="two")
        await house.begun(2)
        another.cancel()

    told(redis_url, store, story)


def test_one_of_a_model_at_a_time(redis_url: str, store: ArtifactStore) -> None:
    """Another release waits until the first has ended; its correction is not asked for."""

    async def story(house: House) -> None:
        first = house.release()
        await house.begun()
        with pytest.raises(Conflict, match=f"{NAME} is under way") as caught:
            await house.release(1, name=TWO, request_id="two")
        assert caught.value.reason == "PUBLICATION_UNDER_WAY"
        await house.gateways[0].apply(published())
        await first
        second = house.release(name=TWO, request_id="two")
        await house.begun(2)
        second.cancel()

    told(redis_url, store, story)


@pytest.mark.parametrize(
    ("fields", "refusal", "reason"),
    [
        ({"name": UNFINISHED}, NotReady, "CORRECTION_NOT_FINISHED"),
        ({"name": "runs/first"}, InvalidInput, "INVALID_NAME"),
    ],
)
def test_what_is_not_begun(
    redis_url: str, store: ArtifactStore, fields: dict[str, str], refusal: type[DefuseError], reason: str
) -> None:
    """A correction that cannot be released is rejected at once; no corrector is asked."""

    async def story(house: House) -> None:
        with pytest.raises(refusal) as caught:
            await house.release(**fields)
        assert caught.value.reason == reason
        assert await house.asked() == []

    told(redis_url, store, story)


def test_an_id_of_another_release(redis_url: str, store: ArtifactStore) -> None:
    """It does not get the answer of a release that it did not ask for."""

    async def story(house: House) -> None:
        first = house.release()
        await house.begun()
        await house.gateways[0].apply(published())
        await first
        with pytest.raises(AlreadyExists, match=f"'one' released {ONE}"):
            await house.release(name=TWO)

    told(redis_url, store, story)


def test_candidates_that_could_not_be_retired(redis_url: str, store: ArtifactStore) -> None:
    """Nobody is told of the end before they are: the event counts when it comes again, and then once."""

    async def story(house: House) -> None:
        waiting = house.release()
        await house.begun()
        house.refusal = Internal("planted")
        with pytest.raises(Internal):
            await house.gateways[0].apply(published())
        assert (await house.gateways[0].get(NAME)).state == Publication.STATE_RUNNING
        house.refusal = None
        for _ in range(2):
            await house.gateways[1].apply(published())
        assert await waiting == RELEASE
        assert house.retired == ["models/tiny"]

    told(redis_url, store, story)


@pytest.mark.parametrize("away", [Unavailable("away"), DeadlineExceeded("slow")])
def test_a_corrector_that_is_away_afterwards(redis_url: str, store: ArtifactStore, away: DefuseError) -> None:
    """Callers have the new version, so that is what is said; candidates can be retired later."""

    async def story(house: House) -> None:
        waiting = house.release()
        await house.begun()
        house.refusal = away
        await house.gateways[0].apply(published())
        assert await waiting == RELEASE

    told(redis_url, store, story)


def test_a_release_cannot_be_stopped(redis_url: str, store: ArtifactStore) -> None:
    """While it is under way that is said, with what helps; one that has ended is returned."""

    async def story(house: House) -> None:
        waiting = house.release()
        await house.begun()
        with pytest.raises(NotReady, match="defuse rollback") as caught:
            await house.gateways[0].cancel(NAME)
        assert caught.value.reason == "NOT_CANCELLABLE"
        await house.gateways[0].apply(published())
        await waiting
        assert (await house.gateways[0].cancel(NAME)).state == Publication.STATE_SUCCEEDED

    told(redis_url, store, story)


def test_what_comes_after_the_end() -> None:
    """It changes nothing."""
    publication = Publication(name=NAME, state=Publication.STATE_RUNNING)
    apply_event(publication, published())
    ended = Publication.FromString(publication.SerializeToString())
    for event in (published(), failed(Internal("late")), work_pb2.Event(subject=NAME, progress={"note": "late"})):
        assert apply_event(publication, event) == []
    assert publication == ended
    assert publication.update_time.seconds > 0
