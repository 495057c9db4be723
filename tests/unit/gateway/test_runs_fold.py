import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import run_pb2, work_pb2

from services.gateway.runs import check_distilled, complete, fold
from services.runtime.queue import DISTILL, IDENTIFY

Run = run_pb2.Run
NAME = "runs/first"
ROOT = Path(__file__).parents[3]


def new_run(**search: Any) -> run_pb2.Run:
    config = complete(run_pb2.RunConfig(model="models/tiny", search=run_pb2.SearchConfig(**search)))
    run = Run(name=NAME, config=config, state=Run.STATE_PREPARING)
    run.create_time.FromSeconds(1000)
    run.update_time.FromSeconds(1000)
    return run


def prepared(count: int) -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, prepared=work_pb2.Prepared(source_count=count))


def identified(shard: int, **counts: int) -> work_pb2.Event:
    done = work_pb2.ShardIdentified(shard=shard, counts=run_pb2.SearchCounts(**counts))
    return work_pb2.Event(subject=NAME, shard_identified=done)


def distilled(count: int) -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, distilled=work_pb2.Distilled(region_count=count))


def failed(error: str) -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, failed=work_pb2.StageFailed(error=error))


def progress(state: "run_pb2.Run.State.ValueType", share: float, note: str = "") -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, progress=work_pb2.StageProgress(state=state, progress=share, note=note))


CANCELLED = work_pb2.Event(subject=NAME, cancelled=work_pb2.Cancelled())
STORY = (
    prepared(250),
    identified(1, sources=100, decodes=7, failures=3),
    identified(0, sources=100, decodes=5, failures=2),
    identified(2, sources=50, decodes=1, candidates=4),
    distilled(2),
)


def told(run: run_pb2.Run, events: Sequence[work_pb2.Event]) -> list[list[str]]:
    """Fold events into a run; return the streams that each one's work goes to."""
    return [[stream for stream, _ in fold(run, event)] for event in events]


def test_the_whole_story() -> None:
    """Preparation starts one message a shard, the last shard starts the distillation, whose end is the run's."""
    run = new_run(shard_size=100)
    assert told(run, STORY) == [[IDENTIFY] * 3, [], [], [DISTILL], []]
    assert (run.state, run.progress, run.region_count) == (Run.STATE_SUCCEEDED, 1.0, 2)
    assert run.counts == run_pb2.SearchCounts(sources=250, decodes=13, candidates=4, failures=5)
    assert list(run.finished_shards) == [0, 1, 2]
    assert "2 regions from 5 failures" in run.note


def test_shards_cover_the_sources() -> None:
    """Shards are ranges one after the other that cover every source once; each carries the run as it was created."""
    run = new_run(shard_size=100)
    works = [message for _, message in fold(run, prepared(250))]
    assert [(work.shard, work.begin, work.end) for work in works] == [(0, 0, 100), (1, 100, 200), (2, 200, 250)]
    assert all(work.run == Run(name=NAME, config=run.config, create_time=run.create_time) for work in works)


def test_distillation_knows_how_many_shards_there_are() -> None:
    """The message that starts the distillation says how many shards to collect."""
    run = new_run(shard_size=100)
    works = [work for event in STORY[:4] for work in fold(run, event)]
    assert works[-1][1].shard_count == 3


def test_events_that_come_twice_change_nothing() -> None:
    """Every event delivered once more, at once or at the end, leaves the run as it is and starts no work."""
    run = new_run(shard_size=100)
    for event in STORY:
        fold(run, event)
        once = Run.FromString(run.SerializeToString())
        assert list(fold(run, event)) == []
        assert run == once
    assert told(run, STORY) == [[], [], [], [], []]
    assert run == once


def test_shards_in_any_order_give_the_same_run() -> None:
    """The order in which shards end does not show."""
    one, other = new_run(shard_size=100), new_run(shard_size=100)
    told(one, STORY)
    told(other, [STORY[0], STORY[3], STORY[2], STORY[1], STORY[4]])
    other.update_time.CopyFrom(one.update_time)
    assert one == other


def test_progress_of_the_present_stage() -> None:
    """Progress and note of the present stage are taken over, without touching the time of the last change."""
    run = new_run()
    assert list(fold(run, progress(Run.STATE_PREPARING, 0.4, "epoch 2 of 5"))) == []
    assert (run.progress, run.note, run.update_time.seconds) == (0.4, "epoch 2 of 5", 1000)


def test_progress_of_a_stage_already_left_is_ignored() -> None:
    """A report that comes late does not turn the run back."""
    run = new_run(shard_size=100)
    told(run, STORY[:2])
    before = Run.FromString(run.SerializeToString())
    fold(run, progress(Run.STATE_PREPARING, 0.4, "epoch 2 of 5"))
    fold(run, progress(Run.STATE_DISTILLING, 0.4, "too early"))
    assert run == before


def test_a_note_without_a_stage_is_shown() -> None:
    """What any worker waits for is shown; the progress stays."""
    run = new_run(shard_size=100)
    told(run, STORY[:2])
    fold(run, progress(Run.STATE_UNSPECIFIED, 0.0, "waiting: Triton does not answer"))
    assert (run.note, run.progress) == ("waiting: Triton does not answer", pytest.approx(1 / 3))


def test_progress_of_the_search_is_its_finished_shards() -> None:
    """Each shard moves the progress by its share, and the note says what was found so far."""
    run = new_run(shard_size=100)
    told(run, STORY[:3])
    assert run.progress == pytest.approx(2 / 3)
    assert run.note == "5 failures in 12 perturbations"


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_a_stage_that_gave_up_ends_the_run(stage: int) -> None:
    """From any stage, a failure ends the run with its sentence; nothing that comes later changes that."""
    run = new_run(shard_size=100)
    told(run, STORY[:stage])
    fold(run, failed("the disk is gone"))
    assert (run.state, run.error) == (Run.STATE_FAILED, "the disk is gone")
    assert run.update_time.seconds > 1000
    ended = Run.FromString(run.SerializeToString())
    assert told(run, [*STORY, CANCELLED, failed("again"), progress(Run.STATE_FAILED, 0.1, "x")]) == [[]] * 8
    assert run == ended


def test_a_cancelled_run_stays_cancelled() -> None:
    """What stages still say after a cancellation starts no work and leaves the state."""
    run = new_run(shard_size=100)
    told(run, [STORY[0], CANCELLED])
    assert run.state == Run.STATE_CANCELLED
    assert told(run, [*STORY[1:], failed("late")]) == [[]] * 5
    assert (run.state, run.error) == (Run.STATE_CANCELLED, "")


def test_cancelling_a_finished_run_changes_nothing() -> None:
    """A run that has succeeded cannot be cancelled any more."""
    run = new_run(shard_size=100)
    told(run, [*STORY, CANCELLED])
    assert run.state == Run.STATE_SUCCEEDED


def test_no_regions_is_a_success() -> None:
    """A classifier without failures gives a run that ends well, with nothing in it."""
    run = new_run(shard_size=100)
    told(run, [prepared(100), identified(0, sources=100, decodes=50), distilled(0)])
    assert (run.state, run.region_count) == (Run.STATE_SUCCEEDED, 0)


def test_defaults() -> None:
    """What is not given takes its default; what is given stays, beside other defaults."""
    defaults = complete(run_pb2.RunConfig())
    whole = complete(run_pb2.RunConfig(seed=3, search=run_pb2.SearchConfig(radius_sd=1.5)))
    assert (whole.seed, whole.search.radius_sd) == (3, 1.5)
    assert whole.search.draws_per_source == defaults.search.draws_per_source
    assert whole.mixture == defaults.mixture
    assert (defaults.search.max_sources, defaults.vae) == (0, run_pb2.VaeConfig())


def test_defaults_are_those_that_the_contract_promises() -> None:
    """Each `Default 5.` in the contract is the value that is filled in."""
    text = (ROOT / "protos/defuse/v1/run.proto").read_text()
    promised = re.findall(r"Default ([\d.]+\d|\d+)\..*\n\s+\w+ (\w+) = ", text)
    whole = complete(run_pb2.RunConfig())
    filled = {field.name: value for section in (whole.search, whole.mixture) for field, value in section.ListFields()}
    assert {name: float(value) for value, name in promised} == filled


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("search.radius_sd", 3.1),
        ("search.radius_sd", -0.5),
        ("search.radius_sd", float("nan")),
        ("search.draws_per_source", -1),
        ("search.max_failures_per_source", -1),
        ("search.min_label_probability", 1.0),
        ("search.held_out_fraction", 1.0),
        ("search.max_sources", -5),
        ("search.shard_size", -1),
        ("search.batch_size", 100_000),
        ("mixture.max_components", 1001),
        ("mixture.min_support", 1),
        ("mixture.fresh_decodes", -1),
        ("vae.latent_dim", 257),
        ("vae.epochs", -1),
        ("vae.beta", float("inf")),
    ],
)
def test_values_out_of_their_bounds_are_refused_by_name(path: str, value: float) -> None:
    """A value outside its bounds is refused with its name and itself."""
    section, name = path.split(".")
    config = run_pb2.RunConfig()
    setattr(getattr(config, section), name, value)
    with pytest.raises(InvalidInput, match=f"{path} is {value}"):
        complete(config)


def test_regions_are_there_once_the_run_has_succeeded() -> None:
    """Whoever asks too early is told the state."""
    run = new_run(shard_size=100)
    with pytest.raises(NotReady, match="'first' is preparing"):
        check_distilled(run)
    told(run, STORY)
    check_distilled(run)
