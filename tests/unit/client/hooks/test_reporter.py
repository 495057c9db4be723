"""Batches, and the effect of a refusal on a batch."""

from collections.abc import Iterable
from datetime import UTC, datetime

import grpc
import pytest
from defuse.connection import Credentials
from defuse.hooks import DeliveryCounts, Observation
from defuse.hooks.buffer import OBSERVATIONS, Buffer
from defuse.hooks.observation import LoggedObservation
from defuse.hooks.reporter import MAX_BATCH_BYTES, MAX_OBSERVATIONS, ReportBatch, Reporter, batch_observations
from defuse.hooks.uploader import ThrottledLog, Uploader
from defuse.v1 import monitor_pb2
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.hooks.servers import MODEL, Gateway


def observation(number: int, size: int = 4, scores: int = 3) -> monitor_pb2.Observation:
    return monitor_pb2.Observation(id=str(number), input=bytes(size), scores=[0.5] * scores)


def observations_of(batch: ReportBatch) -> list[monitor_pb2.Observation]:
    return [one for request in batch.requests for one in request.observations]


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from([4, 5, 300_000, 700_000])), max_size=30))
def test_batches_hold_bounds(given_: list[tuple[int, int]]) -> None:
    """Each observation is in one batch of its size and model."""
    sent = [(f"m{number % 2}", observation(number, size)) for number, size in given_]
    found = list(batch_observations(sent))
    assert sorted((batch.model, one.id, len(one.input)) for batch in found for one in observations_of(batch)) == sorted(
        (model, one.id, len(one.input)) for model, one in sent
    )
    assert len({batch.id for batch in found}) == len(found)
    for batch in found:
        assert len({len(one.input) for one in observations_of(batch)}) == 1
        assert sum(one.ByteSize() for one in observations_of(batch)) <= MAX_BATCH_BYTES


def test_full_batch() -> None:
    found = list(batch_observations(("m", observation(number)) for number in range(MAX_OBSERVATIONS + 1)))
    assert [len(batch.observation_ids) for batch in found] == [MAX_OBSERVATIONS, 1]


def test_messages_of_a_batch() -> None:
    """The first message names model and batch.

    All are within the contract's limit.
    """
    [batch] = batch_observations(("m", observation(number, 300_000)) for number in range(10))
    requests = batch.requests
    assert [(request.model, request.batch_id) for request in requests] == [("models/m", batch.id)] + [("", "")] * 9
    assert [one.id for request in requests for one in request.observations] == [str(number) for number in range(10)]
    assert max(request.ByteSize() for request in requests) <= 1 << 20


def report(gateway: Gateway, observations: Iterable[tuple[str, int]]) -> DeliveryCounts:
    """Report observations, given by id and image size, in one call."""
    buffer, log = Buffer(1_000, 1 << 30), ThrottledLog()
    for id_, size in observations:
        buffer.put(LoggedObservation(Observation(model=MODEL, id=id_, time=datetime.now(UTC), input=bytes(size))))
    uploader = Uploader(gateway.address, Credentials("", gateway.address), log)
    Reporter(buffer, uploader, log, None).report_queued()
    uploader.close()
    return buffer.counts(OBSERVATIONS)


def test_images_of_another_size(gateway: Gateway) -> None:
    """A separate batch reports them: the gateway refuses whole batches."""
    gateway.codes = [grpc.StatusCode.INVALID_ARGUMENT]
    counts = report(gateway, [(f"a{number}", 4 + number % 2) for number in range(6)])
    assert (counts.stored, counts.dropped, counts.waiting) == (3, {"invalid_argument": 3}, 0)
    assert set(gateway.stored) == {"a1", "a3", "a5"}


@pytest.mark.parametrize(("bad", "reports", "stored"), [(3, 4, 10), (20, 8, 0)])
def test_refusal_that_names_an_observation(gateway: Gateway, bad: int, reports: int, stored: int) -> None:
    """The others are reported without it, unless many are named in turn."""
    ids = [f"{kind}{number}" for kind, count in (("a", 10), ("bad", bad)) for number in range(count)]
    counts = report(gateway, [(id_, 4) for id_ in ids])
    assert (counts.stored, counts.dropped) == (stored, {"invalid_argument": len(ids) - stored})
    assert len(gateway.calls) == reports
    assert len(gateway.stored) == stored


def test_refusal_of_a_single_observation(gateway: Gateway) -> None:
    assert report(gateway, [("bad", 4)]).dropped == {"invalid_argument": 1}
    assert len(gateway.calls) == 1


def test_repeated_id(gateway: Gateway) -> None:
    """It is stored once.

    The repetition goes to another batch and is counted.
    """
    counts = report(gateway, [("a", 4), ("b", 4), ("a", 4)])
    assert (counts.stored, counts.dropped) == (2, {"repeated": 1})
