"""Batches that a gateway takes: bounded, in messages below its limit."""

from defuse.hooks.reporter import MAX_BATCH_BYTES, MAX_OBSERVATIONS, ReportBatch, batch_observations
from defuse.v1 import monitor_pb2
from hypothesis import given
from hypothesis import strategies as st


def observation(number: int, size: int = 4, scores: int = 3) -> monitor_pb2.Observation:
    return monitor_pb2.Observation(id=str(number), input=bytes(size), scores=[0.5] * scores)


def observations(batch: ReportBatch) -> list[monitor_pb2.Observation]:
    return [one for request in batch.requests for one in request.observations]


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from([4, 5, 300_000, 700_000])), max_size=30))
def test_nothing_is_lost_and_bounds_hold(given_: list[tuple[int, int]]) -> None:
    """Everything is in one batch, with others of its size and model; ids are there once in each."""
    sent = [(f"m{number % 2}", observation(number, size)) for number, size in given_]
    found = list(batch_observations(sent))
    assert sorted((batch.model, one.id, len(one.input)) for batch in found for one in observations(batch)) == sorted(
        (model, one.id, len(one.input)) for model, one in sent
    )
    assert len({batch.id for batch in found}) == len(found)
    for batch in found:
        assert len({len(one.input) for one in observations(batch)}) == 1
        assert sum(one.ByteSize() for one in observations(batch)) <= MAX_BATCH_BYTES


def test_a_batch_is_full() -> None:
    found = list(batch_observations(("m", observation(number)) for number in range(MAX_OBSERVATIONS + 1)))
    assert [len(batch.observation_ids) for batch in found] == [MAX_OBSERVATIONS, 1]


def test_messages() -> None:
    """The first one names model and batch; none is larger than the contract allows."""
    [batch] = batch_observations(("m", observation(number, 300_000)) for number in range(10))
    requests = batch.requests
    assert [(request.model, request.batch_id) for request in requests] == [("models/m", batch.id)] + [("", "")] * 9
    assert [one.id for request in requests for one in request.observations] == [str(number) for number in range(10)]
    assert max(request.ByteSize() for request in requests) <= 1 << 20
