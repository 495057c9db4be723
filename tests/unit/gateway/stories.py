"""Events that tell the story of a run, for tests of the fold."""

from collections.abc import Sequence
from typing import Any

from defuse.v1 import region_pb2, run_pb2, tensor_pb2, work_pb2

from services.gateway.runs.config import complete
from services.gateway.runs.runs import apply_event

Run = run_pb2.Run
NAME = "runs/first"
PREFLIGHT = run_pb2.Preflight(accuracy=tensor_pb2.Estimate(value=0.9), label_model_accuracy=0.95)


def new_run(**search: Any) -> run_pb2.Run:
    """Return a run in its first state, whose shards have 100 sources."""
    wanted = run_pb2.SearchConfig(**{"shard_size": 100, **search})
    config = complete(run_pb2.RunConfig(model="models/tiny", search=wanted))
    run = Run(name=NAME, config=config, state=Run.STATE_PREPARING)
    run.create_time.FromSeconds(1000)
    run.update_time.FromSeconds(1000)
    return run


def uniform_run() -> run_pb2.Run:
    return new_run(strategy=run_pb2.SearchConfig.STRATEGY_UNIFORM)


def prepared(count: int) -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, prepared=work_pb2.Prepared(source_count=count, preflight=PREFLIGHT))


def identified(shard: int, round_: int = 0, **counts: int) -> work_pb2.Event:
    done = work_pb2.ShardIdentified(shard=shard, round=round_, counts=run_pb2.SearchCounts(**counts))
    return work_pb2.Event(subject=NAME, shard_identified=done)


def planned(round_: int, decodes: int) -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, round_planned=work_pb2.RoundPlanned(round=round_, decodes=decodes))


def distilled(count: int) -> work_pb2.Event:
    counts = region_pb2.GroupCounts(failures=5, groups=count + 4, below_support=3, not_worse_than_control=1)
    return work_pb2.Event(subject=NAME, distilled=work_pb2.Distilled(region_count=count, counts=counts))


def failed(error: str, reason: str = "") -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, failed=work_pb2.StageFailed(error=error, reason=reason))


def progress(state: "run_pb2.Run.State.ValueType", share: float, note: str = "") -> work_pb2.Event:
    return work_pb2.Event(subject=NAME, progress=work_pb2.StageProgress(state=state, progress=share, note=note))


CANCELLED = work_pb2.Event(subject=NAME, cancelled=work_pb2.Cancelled())
# Three shards, searched once.
UNIFORM = (
    prepared(250),
    identified(1, sources=100, decodes=7, failures=3),
    identified(0, sources=100, decodes=5, failures=2),
    identified(2, sources=50, decodes=1, candidates=6),
    distilled(2),
)
# The same shards, searched in three rounds.
ADAPTIVE = (
    prepared(250),
    identified(2, sources=50, decodes=1),
    identified(0, sources=100, decodes=5, failures=2),
    identified(1, sources=100, decodes=7, failures=3),
    planned(1, 40),
    identified(0, 1, decodes=20, failures=4),
    identified(2, 1),
    identified(1, 1, decodes=10, failures=6),
    planned(2, 30),
    identified(1, 2, decodes=30, failures=9),
    identified(2, 2),
    identified(0, 2),
    distilled(4),
)


def told(run: run_pb2.Run, events: Sequence[work_pb2.Event]) -> list[list[str]]:
    """Fold events into a run; return the streams that each one's work goes to."""
    return [[stream for stream, _ in apply_event(run, event)] for event in events]


def works_of(run: run_pb2.Run, *events: work_pb2.Event) -> list[Any]:
    """Fold events into a run; return the messages that start the work that follows."""
    return [message for event in events for _, message in apply_event(run, event)]


def copy_of(run: run_pb2.Run) -> run_pb2.Run:
    return Run.FromString(run.SerializeToString())
