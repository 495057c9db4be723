"""The rounds of a run: the work after the end of a round, and events without effect."""

import pytest
from defuse.v1 import work_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.runs.runs import apply_event
from services.runtime.queue import DISTILL, IDENTIFY, PLAN
from tests.unit.gateway.stories import (
    ADAPTIVE,
    UNIFORM,
    Run,
    copy_of,
    identified,
    new_run,
    planned,
    told,
    uniform_run,
    works_of,
)


def test_the_whole_story_in_rounds() -> None:
    """The last shard of a round asks for a plan, a plan starts the next round, the last one the distillation."""
    run = new_run(rounds=3)
    search = [IDENTIFY] * 3
    assert told(run, ADAPTIVE) == [search, [], [], [PLAN], search, [], [], [PLAN], search, [], [], [DISTILL], []]
    assert (run.state, run.round, run.region_count) == (Run.STATE_SUCCEEDED, 2, 4)
    assert (run.counts.sources, run.counts.decodes, run.counts.failures) == (250, 73, 24)
    assert "73 perturbations of 250 images at radius 0.5 sd in 3 rounds" in run.note


def test_works_say_their_round() -> None:
    """Plans and shards are asked for by round, and the distillation is told how many rounds to collect."""
    run = new_run(rounds=3)
    works = works_of(run, *ADAPTIVE)
    plans = [work for work in works if isinstance(work, work_pb2.PlanWork)]
    assert [(work.round, work.shard_count) for work in plans] == [(1, 3), (2, 3)]
    shards = [work for work in works if isinstance(work, work_pb2.IdentifyWork)]
    assert [(work.round, work.shard) for work in shards] == [
        (round_, shard) for round_ in range(3) for shard in range(3)
    ]
    assert (works[-1].shard_count, works[-1].round_count) == (3, 3)
    assert all(work.run == shards[0].run for work in works)


@pytest.mark.parametrize("after", [1, 2])
def test_an_empty_plan_ends_the_search(after: int) -> None:
    """A plan without decodes starts the distillation of the rounds that there were."""
    run = new_run(rounds=3)
    told(run, ADAPTIVE[: 4 * after])
    [work] = works_of(run, planned(after, 0))
    assert work == work_pb2.DistillWork(run=work.run, shard_count=3, round_count=after)
    assert run.state == Run.STATE_DISTILLING
    told(run, ADAPTIVE[-1:])
    assert f"in {after} round{'s' * (after > 1)};" in run.note


def test_a_uniform_search_has_one_round() -> None:
    """However many rounds are configured, a uniform search is distilled after its first."""
    run = uniform_run()
    assert run.config.search.rounds > 1
    works = works_of(run, *UNIFORM)
    assert not [work for work in works if isinstance(work, work_pb2.PlanWork)]
    assert works[-1].round_count == 1


def test_events_that_come_twice_or_late_change_nothing() -> None:
    """Any event delivered again, at once or in any later stage or round, leaves the run as it is and starts no work."""
    run = new_run(rounds=3)
    for position, event in enumerate(ADAPTIVE):
        apply_event(run, event)
        once = copy_of(run)
        assert told(run, ADAPTIVE[: position + 1]) == [[]] * (position + 1)
        assert run == once


@pytest.mark.parametrize("event", [planned(1, 40), planned(2, 40), planned(3, 40), identified(0, 1), identified(0, 2)])
def test_events_of_a_round_to_come_change_nothing(event: work_pb2.Event) -> None:
    """Events of a future round, or of an unrequested plan, are ignored."""
    run = new_run(rounds=3)
    told(run, ADAPTIVE[:3])
    before = copy_of(run)
    assert list(apply_event(run, event)) == []
    assert run == before


@given(sequences=st.lists(st.permutations(range(3)), min_size=3, max_size=3))
def test_shards_of_a_round_in_any_order_give_the_same_run(sequences: list[list[int]]) -> None:
    """The order in which the shards of each round end does not show."""
    one, other = new_run(rounds=3), new_run(rounds=3)
    works = works_of(one, *ADAPTIVE)
    rounds = (ADAPTIVE[1:4], ADAPTIVE[5:8], ADAPTIVE[9:12])
    mixed = [[shards[place] for place in order] for shards, order in zip(rounds, sequences, strict=True)]
    story = [ADAPTIVE[0], *mixed[0], ADAPTIVE[4], *mixed[1], ADAPTIVE[8], *mixed[2], ADAPTIVE[12]]
    assert works_of(other, *story) == works
    other.update_time.CopyFrom(one.update_time)
    assert one == other


def test_progress_rises_over_the_rounds() -> None:
    """Progress is the share of all shards of all rounds, and the note says the round."""
    run, shares, notes = new_run(rounds=3), [], []
    for event in ADAPTIVE[:11]:
        apply_event(run, event)
        shares.append(run.progress)
        notes.append(run.note)
    assert shares == pytest.approx([n / 9 for n in (0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8)])
    assert notes[7] == "round 2 of 3: 15 failures in 43 perturbations"


def test_a_round_begins_without_finished_shards() -> None:
    """Shards count anew in each round."""
    run = new_run(rounds=3)
    told(run, ADAPTIVE[:4])
    assert list(run.finished_shards) == [0, 1, 2]
    told(run, ADAPTIVE[4:6])
    assert (run.round, list(run.finished_shards)) == (1, [0])
