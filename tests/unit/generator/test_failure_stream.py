import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from defuse.errors import Cancelled, DefuseError, InvalidInput, NotReady
from defuse.v1 import failure_pb2, run_pb2, work_pb2
from defuse.v1 import generator_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.generator.failure_stream import StreamPosition, stream_failures
from services.generator.failures import Failures
from services.runtime.queue import IDENTIFY, PLAN
from services.storage import keys
from services.storage.safetensors import join_groups
from tests.unit.generator.run_fixture import Workshop

SEARCH: dict[str, Any] = {"draws_per_source": 6, "rounds": 3, "shard_size": 120}
MIB = 1 << 20


def followed(workshop: Workshop, run: run_pb2.Run, token: str = "") -> list[pb.IdentifyResponse]:
    """Return all that a follower is sent, from a token on."""

    async def collect() -> list[pb.IdentifyResponse]:
        return [response async for response in stream_failures(workshop.context, run, StreamPosition.of(token))]

    return asyncio.run(asyncio.wait_for(collect(), 60))


def identities(responses: list[pb.IdentifyResponse]) -> list[tuple[int, int, int]]:
    return [(one.round, one.source, one.draw) for response in responses for one in response.failures]


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> run_pb2.Run:
    """A run whose search is over."""
    run = workshop.prepared_run("followed", search=SEARCH)
    assert workshop.play(run).round == 2
    return run


def test_everything_that_was_found_is_sent_in_order(workshop: Workshop, run: run_pb2.Run) -> None:
    """A follower gets every stored failure, in the order of rounds, sources and draws, with all that is known of it."""
    responses, found = followed(workshop, run), workshop.found(run)
    sent = [failure for response in responses for failure in response.failures]
    assert len(sent) == len(found["source"]) > 30
    assert identities(responses) == sorted(identities(responses))
    for row, failure in enumerate(sent):
        expected = failure_pb2.Failure(
            run=run.name,
            model_version=run.config.model_version,
            **{name: array[row].tolist() for name, array in found.items() if name != "held_out"},
            held_out=bool(found["held_out"][row]),
        )
        assert failure == expected
    rows = {(response.resume_token.split(".")[0], response.shard) for response in responses}
    assert len(rows) == 3 * 3


def test_a_follower_goes_on_where_he_stopped(workshop: Workshop, run: run_pb2.Run) -> None:
    """From the token of any response exactly what lies behind it is sent: nothing twice, nothing left out."""
    responses = followed(workshop, run)
    for position, response in enumerate(responses):
        rest = followed(workshop, run, response.resume_token)
        assert identities(rest) == identities(responses[position + 1 :])
    assert identities(followed(workshop, run, StreamPosition().token())) == identities(responses)


def with_many(workshop: Workshop, run_id: str, count: int, dim: int) -> run_pb2.Run:
    """Plant a run with one shard of so many failures in so many dimensions."""
    search = {"strategy": run_pb2.SearchConfig.STRATEGY_UNIFORM, "shard_size": 1000}
    run = workshop.prepared_run(run_id, search=search)
    many = Failures.of(
        source=np.arange(count) + 2**40,
        draw=np.arange(count) + 2**30,
        true_label=np.full(count, 999),
        predicted_label=np.full(count, 998),
        **{
            name: np.full(count, -1.5)
            for name in ("margin", "radius_sd", "label_probability", "typicality", "round_trip_sd", "oracle_margin")
        },
        neighbour_agreement=np.ones(count),
        held_out=np.ones(count),
        latent=np.ones((count, dim), np.float32),
    )
    workshop.store.write_arrays(keys.shard_result(run.name, 0, 0), join_groups(failures=many.arrays()))
    return run


@pytest.mark.parametrize(("count", "dim"), [(20_000, 4), (9000, 64), (3000, 512)])
def test_responses_are_small(workshop: Workshop, count: int, dim: int) -> None:
    """However many failures a shard has, and whatever the run is called, a response holds at most 1 MiB of them."""
    run = with_many(workshop, f"many-{dim}".ljust(63, "x"), count, dim)
    responses = followed(workshop, run)
    assert max(response.ByteSize() for response in responses) <= MIB + 100  # of the response itself
    assert len(responses) <= 2 + 2 * sum(response.ByteSize() for response in responses) // MIB
    expected = list(range(2**40, 2**40 + count))
    assert [source for _, source, _ in identities(responses)] == expected
    rest = followed(workshop, run, responses[0].resume_token)
    assert [source for _, source, _ in identities(rest)] == expected[len(responses[0].failures) :]


def test_shards_without_failures_are_told_too(workshop: Workshop) -> None:
    """A shard in which nothing was found is a response of its own, so that a follower sees the search go on."""
    run = with_many(workshop, "nothing", 0, 4)
    [response] = followed(workshop, run)
    assert (len(response.failures), response.shard) == (0, 0)
    assert not identities(followed(workshop, run, response.resume_token))


def test_an_empty_plan_ends_the_stream(workshop: Workshop) -> None:
    """Where a plan gives out nothing the stream ends with the rounds that there were."""
    run = workshop.prepared_run("one-round", search=SEARCH | {"draws_per_source": 1})
    workshop.play(run)
    assert {failure.round for response in followed(workshop, run) for failure in response.failures} == {0}


class Follower:
    """Somebody who reads a run's failures while it is under way."""

    def __init__(self, workshop: Workshop, run: run_pb2.Run) -> None:
        self._stream: AsyncIterator[pb.IdentifyResponse] = stream_failures(workshop.context, run, StreamPosition())

    async def read(self) -> pb.IdentifyResponse:
        return await asyncio.wait_for(anext(self._stream), 60)

    async def left(self) -> list[pb.IdentifyResponse]:
        return [response async for response in self._stream]


def test_failures_are_sent_as_they_are_found(workshop: Workshop) -> None:
    """Stored failures are sent at once, before later shards and rounds are planned; the rest follows."""
    run = workshop.prepared_run("live", search=SEARCH)

    async def live() -> list[pb.IdentifyResponse]:
        follower = Follower(workshop, run)
        responses = []
        for round_ in range(3):
            if round_:
                work: Any = work_pb2.PlanWork(run=run, round=round_, shard_count=3)
                await asyncio.to_thread(workshop.do, PLAN, work)
            for shard in range(3):
                waiting = asyncio.create_task(follower.read())
                work = work_pb2.IdentifyWork(run=run, shard=shard, round=round_)
                await asyncio.to_thread(workshop.do, IDENTIFY, work)
                responses.append(await waiting)
                assert responses[-1].shard == shard
        assert await follower.left() == []
        return responses

    responses = asyncio.run(live())
    assert responses == followed(workshop, run)


CANCELLED = work_pb2.Event(cancelled=work_pb2.Cancelled())


def failed(error: str, reason: str = "") -> work_pb2.Event:
    return work_pb2.Event(failed=work_pb2.StageFailed(error=error, reason=reason))


@pytest.mark.parametrize(
    ("kind", "event", "error", "reason"),
    [
        ("cancelled", CANCELLED, Cancelled, "CANCELLED"),
        ("failed", failed("mush", "VAE_TOO_COARSE"), NotReady, "VAE_TOO_COARSE"),
        ("failed", failed("mush"), NotReady, "RUN_FAILED"),
    ],
)
def test_a_run_that_ends_early_ends_the_stream(
    workshop: Workshop, kind: str, event: work_pb2.Event, error: type[DefuseError], reason: str
) -> None:
    """A follower gets what was found, and then why there is no more: cancelled, or the run's own error and reason."""
    run = workshop.prepared_run(f"early-{reason.lower().replace('_', '-')}", search=SEARCH)
    workshop.do(IDENTIFY, work_pb2.IdentifyWork(run=run, shard=0, round=0))
    workshop.store.write_message(keys.event(run.name, kind), event)

    async def until_the_end() -> Exception:
        follower = Follower(workshop, run)
        assert (await follower.read()).shard == 0
        with pytest.raises(error, match=r"mush|cancelled") as caught:
            await follower.read()
        return caught.value

    ended = asyncio.run(until_the_end())
    assert isinstance(ended, error)
    assert ended.reason == reason


def test_a_run_that_was_never_prepared_ends_the_stream(workshop: Workshop) -> None:
    """A run refused before its search has an error for its follower too."""
    run = workshop.new_run("refused", search=SEARCH)
    event = failed("the range is wrong", "PREPROCESSING_MISMATCH")
    workshop.store.write_message(keys.event(run.name, "failed"), event)
    with pytest.raises(NotReady, match="run 'refused' failed: the range is wrong") as caught:
        followed(workshop, run)
    assert caught.value.reason == "PREPROCESSING_MISMATCH"


@given(st.integers(0, 99), st.integers(0, 10**6), st.integers(0, 10**8))
def test_tokens_are_read_back(round_: int, shard: int, offset: int) -> None:
    """A token says where its response ended."""
    position = StreamPosition(round_=round_, shard=shard, offset=offset)
    assert StreamPosition.of(position.token()) == position


@pytest.mark.parametrize("token", ["1.2", "1.2.3.4", "a.b.c", "-1.0.0", "1..2", " 1.2.3", "1.2.3\n", "²·1", "9" * 5000])
def test_a_bad_token_is_refused(token: str) -> None:
    """A token that no response contained is invalid."""
    for bad in (token, f"0.0.{token}"):
        with pytest.raises(InvalidInput, match="no resume token") as caught:
            StreamPosition.of(bad)
        assert caught.value.reason == "BAD_RESUME_TOKEN"
