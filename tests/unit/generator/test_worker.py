import threading
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
from defuse.errors import Cancelled
from defuse.v1 import run_pb2, work_pb2

from services.generator import worker
from services.generator.rounds import read_result
from services.runtime.queue import IDENTIFY, PLAN
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.keys import SEARCHED_SPLIT
from tests.unit.generator.run_fixture import Workshop, weak

SEARCH: dict[str, Any] = {"draws_per_source": 4, "rounds": 3, "shard_size": 100, "batch_size": 64}


def shard_work(run: run_pb2.Run, shard: int = 1, round_: int = 0) -> work_pb2.IdentifyWork:
    return work_pb2.IdentifyWork(run=run, shard=shard, round=round_)


def plan_work(run: run_pb2.Run, round_: int = 1) -> work_pb2.PlanWork:
    return work_pb2.PlanWork(run=run, round=round_, shard_count=3)


def first_round(workshop: Workshop, run_id: str) -> run_pb2.Run:
    run = workshop.prepared_run(run_id, search=SEARCH)
    for shard in range(3):
        workshop.do(IDENTIFY, shard_work(run, shard))
    return run


def below(store: ArtifactStore, name: str) -> dict[str, bytes]:
    """Return everything that is stored of a run."""
    parts = ("sources", "results", "plans")
    record_keys = [key for part in parts for key in store.keys(f"{name}/{part}") if not key.endswith(".partial")]
    return {key: store.read_bytes(key) for key in record_keys}


class Served:
    """The classifier under test; counts what it was asked, and is wrong on what it is told by number."""

    def __init__(self, *, before: Callable[[], None] = lambda: None, wrong: Collection[int] = ()) -> None:
        self.images, self._before, self._wrong = 0, before, wrong
        self._lock = threading.Lock()

    def __call__(self, images: Any) -> Any:
        logits = weak(images)
        with self._lock:
            self._before()
            numbers = np.arange(self.images, self.images + len(images))
            self.images += len(images)
        return np.where(np.isin(numbers, list(self._wrong))[:, None], -logits, logits)


def test_a_shard_says_what_it_tried_and_found(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event has shard, round and counts; counted is every picture that was encoded, decoded and classified."""
    run = workshop.prepared_run("shard", search=SEARCH)
    monkeypatch.setitem(workshop.triton.functions, "planted", served := Served())
    event = workshop.do(IDENTIFY, shard_work(run))
    done = event.shard_identified
    assert (event.subject, done.shard, done.round) == ("runs/shard", 1, 0)
    counts = done.counts
    assert (counts.sources, counts.sources_wrong_on_image) == (100, 0)
    assert 80 < counts.decodes <= 100
    assert counts.failures == len(read_result(workshop.store, run.name, 0, 1).failures["source"])
    assert counts.classifications == served.images
    # Each source once as an image and once as a reconstruction; each candidate that passed all checks once more.
    again = counts.classifications - counts.decodes - 200
    assert (counts.encodes, counts.decodes_again) == (100 + again, 100 + again)


def test_sources_are_searched_by_their_shard(workshop: Workshop) -> None:
    """A shard searches its range of the run's sources, and what it stores says so, source by source."""
    run = first_round(workshop, "ranges")
    index = workshop.context.prepared(run).index
    for shard in range(3):
        part = index[shard * 100 : (shard + 1) * 100]
        result = read_result(workshop.store, run.name, 0, shard)
        found, tally = result.failures["source"], result.tally
        assert set(found) <= set(part)
        np.testing.assert_array_equal(tally["failures"], [(found == source).sum() for source in part])
        assert 80 < tally["decodes"].sum() <= 100


def test_failures_know_what_they_came_from(workshop: Workshop) -> None:
    """Labels and held-out marks of stored failures are those of their sources."""
    run = workshop.prepared_run("marks", search=SEARCH)
    workshop.play(run)
    found, prepared = workshop.found(run), workshop.context.prepared(run)
    labels = workshop.context.images(run, SEARCHED_SPLIT).labels
    np.testing.assert_array_equal(found["true_label"], labels[found["source"]])
    row = np.searchsorted(prepared.index, found["source"])
    np.testing.assert_array_equal(found["held_out"], prepared.held_out[row])
    assert 0 < found["held_out"].mean() < 1


def test_sources_that_are_wrong_already_are_left_out(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source read wrong as an image, or as a reconstruction, is counted once, the image first, and not searched."""
    run = workshop.prepared_run("wrong", search=SEARCH | {"batch_size": 512})
    # All images of the shard are asked about first, then all of their reconstructions.
    wrong = [0, 1, 2, 100 + 2, 100 + 3, 100 + 4, 100 + 5]
    monkeypatch.setitem(workshop.triton.functions, "planted", Served(wrong=wrong))
    counts = workshop.do(IDENTIFY, shard_work(run)).shard_identified.counts
    assert (counts.sources, counts.sources_wrong_on_image, counts.sources_wrong_on_reconstruction) == (100, 3, 3)
    tally = read_result(workshop.store, run.name, 0, 1).tally
    assert not tally["decodes"][:6].any()
    assert counts.decodes == tally["decodes"].sum() > 80


def test_a_shard_is_searched_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that comes twice is answered with the same event, and nothing is asked or written again."""
    run = workshop.prepared_run("twice", search=SEARCH)
    once = workshop.do(IDENTIFY, shard_work(run))
    before = below(workshop.store, run.name)
    monkeypatch.setitem(workshop.triton.functions, "planted", served := Served())
    assert workshop.do(IDENTIFY, shard_work(run), context=workshop.another_context()) == once
    assert served.images == 0
    assert below(workshop.store, run.name) == before


@pytest.mark.parametrize("lost", ["results", "sources"])
def test_a_worker_that_died_half_way_leaves_no_trace(workshop: Workshop, lost: str) -> None:
    """With any part of a shard missing, a repetition gives the same artifacts, byte for byte."""
    run = workshop.prepared_run(f"died-{lost}", search=SEARCH)
    workshop.do(IDENTIFY, shard_work(run))
    whole = below(workshop.store, run.name)
    order = ("sources", "results")
    for part in order[order.index(lost) :]:
        for key in workshop.store.keys(f"{run.name}/{part}"):
            workshop.store.remove(key)
    assert below(workshop.store, run.name) != whole
    workshop.do(IDENTIFY, shard_work(run), context=workshop.another_context())
    assert below(workshop.store, run.name) == whole


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_worker_that_slept_through_its_claim_changes_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Of two that search one shard, the second answers with the result of the first, though it found another one."""
    run = workshop.prepared_run(f"slept-{call}", search=SEARCH | {"batch_size": 512})
    calls = 0
    first: list[work_pb2.Event] = []
    stored: dict[str, bytes] = {}

    def sleep_at_call() -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            monkeypatch.setitem(workshop.triton.functions, "planted", weak)
            first.append(workshop.do(IDENTIFY, shard_work(run), context=workshop.another_context()))
            monkeypatch.setitem(workshop.triton.functions, "planted", slow)
            stored.update(below(workshop.store, run.name))

    # The one who sleeps is told of perturbations that they are wrong where the other is told that they are right.
    slow = Served(before=sleep_at_call, wrong=range(200, 300))
    monkeypatch.setitem(workshop.triton.functions, "planted", slow)
    second = workshop.do(IDENTIFY, shard_work(run))
    assert [second] == first
    assert below(workshop.store, run.name) == stored
    result = read_result(workshop.store, run.name, 0, 1)
    assert result.counts == second.shard_identified.counts
    assert result.counts.failures == len(result.failures["source"]) == result.tally["failures"].sum()


def test_sources_are_examined_in_the_first_round_only(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later rounds take over how the sources are read, and classify nothing but perturbations."""
    run = first_round(workshop, "examined")
    workshop.do(PLAN, plan_work(run))
    monkeypatch.setitem(workshop.triton.functions, "planted", served := Served())
    counts = workshop.do(IDENTIFY, shard_work(run, round_=1)).shard_identified.counts
    assert (counts.sources, counts.sources_wrong_on_image, counts.classifications) == (0, 0, served.images)
    assert counts.decodes <= served.images <= counts.decodes + counts.candidates


def test_a_plan_says_how_much_it_will_decode(workshop: Workshop) -> None:
    """The event has the round and the sum of its decodes, which the shards then stay within."""
    run = first_round(workshop, "planned")
    event = workshop.do(PLAN, plan_work(run))
    assert (event.subject, event.round_planned.round) == (run.name, 1)
    shards = [workshop.do(IDENTIFY, shard_work(run, shard, 1)).shard_identified for shard in range(3)]
    assert 0 < sum(done.counts.decodes for done in shards) <= event.round_planned.decodes


def test_a_plan_is_made_once(workshop: Workshop) -> None:
    """A plan that lies in the store is the plan, whoever is asked again."""
    run = first_round(workshop, "once")
    first = workshop.do(PLAN, plan_work(run))
    before = below(workshop.store, run.name)
    workshop.do(IDENTIFY, shard_work(run, round_=1))
    workshop.store.remove(keys.shard_result(run.name, 0, 0))  # of which it could not be made again
    assert workshop.do(PLAN, plan_work(run), context=workshop.another_context()) == first
    assert workshop.store.read_bytes(keys.plan(run.name, 1)) == before[keys.plan(run.name, 1)]


@pytest.mark.parametrize("call", [1, 7, 23])
def test_a_cancelled_search_stops_at_its_next_batch(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Cancelled while sources are examined or searched, a shard stores no result."""
    run = workshop.prepared_run(f"stopped-{call}", search=SEARCH | {"batch_size": 10})
    job, calls = workshop.job(run), 0

    def cancel_at_call() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            job.cancel()

    monkeypatch.setitem(workshop.triton.functions, "planted", served := Served(before=cancel_at_call))
    with pytest.raises(Cancelled, match=f"runs/stopped-{call} was cancelled"):
        worker.identify(workshop.context, shard_work(run), job)
    assert served.images < 300
    assert not workshop.store.exists(keys.shard_result(run.name, 0, 1))


def test_a_cancelled_plan_is_not_made(workshop: Workshop) -> None:
    """A cancelled run is not planned any further."""
    run = first_round(workshop, "unplanned")
    job = workshop.job(run)
    job.cancel()
    with pytest.raises(Cancelled):
        worker.plan(workshop.context, plan_work(run), job)
    assert not workshop.store.exists(keys.plan(run.name, 1))
