import pytest
from defuse.errors import NotReady
from defuse.v1 import run_pb2

from services.gateway.runs.runs import apply_event, check_distilled
from services.runtime.queue import DISTILL, IDENTIFY
from tests.unit.gateway.stories import (
    CANCELLED,
    NAME,
    PREFLIGHT,
    UNIFORM,
    Run,
    copy_of,
    distilled,
    failed,
    identified,
    new_run,
    prepared,
    progress,
    told,
    uniform_run,
    works_of,
)


def test_the_whole_story() -> None:
    """Preparation starts one message a shard, the last shard starts the distillation, whose end is the run's."""
    run = uniform_run()
    assert told(run, UNIFORM) == [[IDENTIFY] * 3, [], [], [DISTILL], []]
    assert (run.state, run.progress, run.region_count) == (Run.STATE_SUCCEEDED, 1.0, 2)
    assert run.counts == run_pb2.SearchCounts(sources=250, decodes=13, candidates=6, failures=5)
    assert list(run.finished_shards) == [0, 1, 2]
    assert "2 regions from 5 failures" in run.note
    assert "of 6 groups 3 had too few failures and 1 were no worse than their controls" in run.note
    assert run.groups.groups == 6


@pytest.mark.parametrize(("sources", "shards"), [(1, 1), (100, 1), (101, 2), (250, 3)])
def test_shards_cover_the_sources(sources: int, shards: int) -> None:
    """There are as many shards as it takes to hold all sources; each carries the run as it was created."""
    run = new_run(shard_size=100)
    works = works_of(run, prepared(sources))
    assert [(work.shard, work.round) for work in works] == [(shard, 0) for shard in range(shards)]
    assert all(work.run == Run(name=NAME, config=run.config, create_time=run.create_time) for work in works)
    assert run.shard_count == shards


def test_what_preflight_measured_is_told() -> None:
    """The figures of the preflight arrive in the run with the end of its preparation."""
    run = uniform_run()
    apply_event(run, prepared(250))
    assert run.preflight == PREFLIGHT
    assert run.note == "up to 12500 perturbations of 250 images"


def test_shards_in_any_order_give_the_same_run() -> None:
    """The order in which shards end does not show."""
    one, other = uniform_run(), uniform_run()
    told(one, UNIFORM)
    told(other, [UNIFORM[0], UNIFORM[3], UNIFORM[2], UNIFORM[1], UNIFORM[4]])
    other.update_time.CopyFrom(one.update_time)
    assert one == other


def test_progress_of_the_present_stage() -> None:
    """Progress and note of the present stage are taken over, without touching the time of the last change."""
    run = new_run()
    assert list(apply_event(run, progress(Run.STATE_PREPARING, 0.4, "epoch 2 of 5"))) == []
    assert (run.progress, run.note, run.update_time.seconds) == (0.4, "epoch 2 of 5", 1000)


def test_progress_of_a_stage_already_left_is_ignored() -> None:
    """A report that comes late does not turn the run back."""
    run = uniform_run()
    told(run, UNIFORM[:2])
    before = copy_of(run)
    apply_event(run, progress(Run.STATE_PREPARING, 0.4, "epoch 2 of 5"))
    apply_event(run, progress(Run.STATE_DISTILLING, 0.4, "too early"))
    assert run == before


def test_a_note_without_a_stage_is_shown() -> None:
    """A worker's reason to wait is shown; the progress stays."""
    run = uniform_run()
    told(run, UNIFORM[:2])
    apply_event(run, progress(Run.STATE_UNSPECIFIED, 0.0, "waiting: Triton does not answer"))
    assert run.note == "waiting: Triton does not answer"
    assert run.progress == pytest.approx(1 / 3)


def test_progress_of_the_search_is_its_finished_shards() -> None:
    """Each shard moves the progress by its share, and the note says what was found so far."""
    run = uniform_run()
    told(run, UNIFORM[:3])
    assert run.progress == pytest.approx(2 / 3)
    assert run.note == "round 1 of 1: 5 failures in 12 perturbations"


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_a_stage_that_gave_up_ends_the_run(stage: int) -> None:
    """From any stage, a failure ends the run with its sentence and reason; nothing that comes later changes that."""
    run = uniform_run()
    told(run, UNIFORM[:stage])
    apply_event(run, failed("the pictures are mush", "VAE_TOO_COARSE"))
    assert (run.state, run.error, run.error_reason) == (Run.STATE_FAILED, "the pictures are mush", "VAE_TOO_COARSE")
    assert run.update_time.seconds > 1000
    ended = copy_of(run)
    assert told(run, [*UNIFORM, CANCELLED, failed("again"), progress(Run.STATE_FAILED, 0.1, "x")]) == [[]] * 8
    assert run == ended


def test_a_cancelled_run_stays_cancelled() -> None:
    """Events after a cancellation start no work and leave the state."""
    run = uniform_run()
    told(run, [UNIFORM[0], CANCELLED])
    assert run.state == Run.STATE_CANCELLED
    assert told(run, [*UNIFORM[1:], failed("late")]) == [[]] * 5
    assert (run.state, run.error) == (Run.STATE_CANCELLED, "")


def test_cancelling_a_finished_run_changes_nothing() -> None:
    """A run that has succeeded cannot be cancelled any more."""
    run = uniform_run()
    told(run, [*UNIFORM, CANCELLED])
    assert run.state == Run.STATE_SUCCEEDED


def test_no_regions_is_a_success() -> None:
    """A classifier without failures gives a run that ends well, with nothing in it."""
    run = uniform_run()
    told(run, [prepared(100), identified(0, sources=100, decodes=50), distilled(0)])
    assert (run.state, run.region_count) == (Run.STATE_SUCCEEDED, 0)


def test_regions_are_there_once_the_run_has_succeeded() -> None:
    """A call that comes too early gets the state."""
    run = uniform_run()
    with pytest.raises(NotReady, match="'first' is preparing"):
        check_distilled(run)
    told(run, UNIFORM)
    check_distilled(run)
