"""Requests with an id, as two gateways carry them out over a real Redis."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis.exceptions
from defuse.errors import AlreadyExists, Conflict, InvalidInput
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import run_pb2

from services.gateway.records import idempotency
from services.gateway.records.idempotency import IdempotentRequests
from services.gateway.records.store import RecordStore
from services.runtime.queue import KEY, Queue
from tests.queues import close_queues

Ask = Callable[..., Awaitable[pb.CreateRunResponse]]
ID = "6b1f0e6e-6a53-4f2b-8f0b-0e9b2a6f2a11"


class House:
    """Two gateways with one book, what was carried out, and what a test makes happen behind a record."""

    def __init__(self, queues: list[Queue]) -> None:
        self.redis = queues[0].redis
        self.requests = [IdempotentRequests(queue) for queue in queues]
        self.records = RecordStore(queues[0], run_pb2.Run, "runs", lambda _: False)
        self.carried_out = 0
        self.then: Callable[[], Awaitable[None]] | None = None

    async def ask(self, gateway: int = 0, *, run_id: str = "a", request_id: str = ID) -> pb.CreateRunResponse:
        request = pb.CreateRunRequest(run_id=run_id, request_id=request_id)

        async def carry_out() -> pb.CreateRunResponse:
            self.carried_out += 1
            number = self.carried_out
            run = await self.records.create(run_pb2.Run(name=f"runs/{run_id}-{number}", note=str(number)), [])
            if self.then:
                await self.then()
            return pb.CreateRunResponse(run=run)

        return await self.requests[gateway].answer(request, pb.CreateRunResponse, carry_out)


def told(url: str, story: Callable[[House], Awaitable[None]]) -> None:
    async def tell() -> None:
        queues = [Queue(url), Queue(url)]
        try:
            await asyncio.wait_for(story(House(queues)), 60)
        finally:
            await close_queues(*queues)

    asyncio.run(tell())


def test_asked_again(redis_url: str) -> None:
    """Any gateway gives the answer of the first; another id is another request. It is kept for a day."""

    async def story(house: House) -> None:
        first = await house.ask()
        assert [await house.ask(), await house.ask(1)] == [first, first]
        assert (house.carried_out, [run.name for run in await house.records.list()]) == (1, ["runs/a-1"])
        assert await house.ask(request_id="another") != first
        assert 0 < await house.redis.ttl(f"{KEY}request:{ID}") <= 24 * 3600

    told(redis_url, story)


def test_a_reply_of_redis_that_was_lost(redis_url: str) -> None:
    """The record was made, and nobody heard of it: asked again, it is the answer, and nothing is made twice."""

    async def story(house: House) -> None:
        async def lost() -> None:
            raise redis.exceptions.ConnectionError("reset")

        house.then = lost
        with pytest.raises(redis.exceptions.ConnectionError):
            await house.ask()
        house.then = None
        assert (await house.ask(1)).run.name == "runs/a-1"
        assert house.carried_out == 1

    told(redis_url, story)


def test_two_at_once(redis_url: str) -> None:
    """One of them carries it out, the other one waits for its answer."""

    async def story(house: House) -> None:
        house.then = lambda: asyncio.sleep(0.1)
        answers = await asyncio.gather(*(house.ask(number % 2) for number in range(4)))
        assert (house.carried_out, len({answer.run.name for answer in answers})) == (1, 1)

    told(redis_url, story)


def test_an_id_that_was_used_for_another_request(redis_url: str) -> None:
    """It is refused with itself and what to do, while the first is under way and afterwards."""

    async def story(house: House) -> None:
        async def ask_for_another() -> None:
            with pytest.raises(AlreadyExists, match=f"'{ID}' was used for another request; choose a new one") as caught:
                await house.ask(1, run_id="b")
            assert caught.value.reason == "REQUEST_ID_USED"

        house.then = ask_for_another
        await house.ask()
        await ask_for_another()
        assert house.carried_out == 1

    told(redis_url, story)


def test_what_failed_is_carried_out_again(redis_url: str) -> None:
    """A refusal is not kept: the next time the world may be another one."""

    async def fail() -> None:
        raise Conflict("planted")

    async def story(house: House) -> None:
        house.then = fail
        for _ in range(2):
            with pytest.raises(Conflict, match="planted"):
                await house.ask()
        house.then = None
        assert (await house.ask(run_id="b")).run.note == "3"

    told(redis_url, story)


def test_a_gateway_that_dies_behind_the_record(redis_url: str) -> None:
    """Its request is not carried out again: the answer is the record, as soon as its claim is over."""

    async def story(house: House) -> None:
        house.then = asyncio.Event().wait  # type: ignore[assignment]  # for ever
        dying = asyncio.create_task(house.ask())
        while not await house.records.list():
            await asyncio.sleep(0.01)
        dying.cancel()
        await asyncio.wait([dying])
        # A task cleans up where a process does not.
        await house.redis.set(f"{KEY}request:{ID}:held", "dead", px=300)
        answer = await house.ask(1)
        assert (answer.run.name, house.carried_out) == ("runs/a-1", 1)
        assert await house.ask() == answer

    told(redis_url, story)


def test_a_gateway_that_dies_before_the_record(redis_url: str) -> None:
    """Its request is carried out by whoever is asked again."""

    async def story(house: House) -> None:
        await house.redis.set(f"{KEY}request:{ID}:held", "dead", px=300)
        assert (await house.ask()).run.name == "runs/a-1"

    told(redis_url, story)


def test_a_slow_request_stays_in_its_hands(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, nobody else begins with it while its gateway lives."""
    monkeypatch.setattr(idempotency, "LEASE_S", 3.0)  # renewed every 0.6 s: a busy machine may miss some

    async def story(house: House) -> None:
        house.then = lambda: asyncio.sleep(4)
        answers = await asyncio.gather(house.ask(), house.ask(1))
        assert (answers[0], house.carried_out) == (answers[1], 1)

    told(redis_url, story)


def test_a_gateway_that_was_silent_for_too_long_makes_nothing(redis_url: str) -> None:
    """When another one took its request over, its record is refused."""

    async def story(house: House) -> None:
        async def taken() -> pb.CreateRunResponse:
            await house.redis.set(f"{KEY}request:{ID}:held", "another")
            return pb.CreateRunResponse(run=await house.records.create(run_pb2.Run(name="runs/late"), []))

        with pytest.raises(Conflict, match="carried out elsewhere"):
            await house.requests[0].answer(pb.CreateRunRequest(request_id=ID), pb.CreateRunResponse, taken)
        assert await house.records.list() == []

    told(redis_url, story)


@pytest.mark.parametrize("request_id", ["a b", "x" * 64, "-a"])
def test_bad_ids(redis_url: str, request_id: str) -> None:
    """An id is an id like any other."""

    async def story(house: House) -> None:
        with pytest.raises(InvalidInput) as caught:
            await house.ask(request_id=request_id)
        assert (caught.value.reason, house.carried_out) == ("INVALID_ID", 0)

    told(redis_url, story)


def test_every_call_that_creates_takes_an_id() -> None:
    """Methods that create something, or change the served version, can be retried."""
    service: Any = pb.DESCRIPTOR.services_by_name["GatewayService"]
    with_id = {method.name for method in service.methods if "request_id" in method.input_type.fields_by_name}
    making = {method.name for method in service.methods if method.name.startswith(("Create", "Start"))}
    assert with_id == making | {"AnnotateRegion", "ReleaseCorrection", "RollbackModel"}
