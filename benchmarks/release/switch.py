"""The gate, a canary, a release and a rollback under steady load, through Triton and through the gateway."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from defuse.values import Release

from benchmarks.release.load import Answer, Load, steady
from benchmarks.release.world import World
from services.localstack.stack import LocalStack

# After a change, what is still under way belongs to it.
_AFTER_S = 0.5
Span = tuple[float, float]


@dataclass(kw_only=True)
class Timeline:
    """Which versions may answer when, and when something was changed."""

    # (model, version) to the times from when and until when it may answer.
    allowed: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    changes: list[Span] = field(default_factory=list)

    def begin(self, comes: Sequence[tuple[str, str]]) -> None:
        """Let versions answer from now on."""
        for version in comes:
            self.allowed.setdefault(version, []).append([time.monotonic(), float("inf")])

    def end(self, change: Span, goes: Sequence[tuple[str, str]]) -> None:
        """Note a change, at whose end versions went."""
        for version in goes:
            self.allowed[version][-1][1] = change[1]
        self.changes.append(change)

    def permits(self, answer: Answer) -> bool:
        """Say whether who answered was allowed to at some moment while the request was under way."""
        spans = self.allowed.get((answer.model, answer.version), [])
        return any(begin <= answer.sent + answer.took and answer.sent <= end for begin, end in spans)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """From when to when a turn went, when a guard was made in it, and how many seconds its rollback took."""

    whole: Span
    guard: Span
    rollback_s: float


def switch(stack: LocalStack, world: World, *, rate: float, turns: int, pause_s: float) -> dict[str, Any]:
    """Return the figures of the gate and of some turns of canary, release with its guard, and rollback."""
    loads = {"triton": stack.addresses()["triton"], "gateway": stack.gateway}
    first = (world.model_id, "1")
    timelines = {door: Timeline(allowed={first: [[0.0, float("inf")]]}) for door in loads}
    with ExitStack() as block:
        found = [
            block.enter_context(steady(door, at, world.model_id, world.image(), rate=rate))
            for door, at in loads.items()
        ]
        begin = time.monotonic()
        time.sleep(pause_s)
        gate = world.ask_gate()
        time.sleep(pause_s)
        done = [_turn(world, timelines, turn, pause_s) for turn in range(turns)]
    return _figures(found, timelines, done, begin, gate)


def _turn(world: World, timelines: dict[str, Timeline], turn: int, pause_s: float) -> Turn:
    """Candidate, canary, release and its guard, rollback."""
    client, champion, new = world.client, (world.model_id, "1"), (world.model_id, str(2 + turn))
    gateway, both = [timelines["gateway"]], list(timelines.values())
    start = time.monotonic()
    time.sleep(pause_s)
    (run, correction, candidate), _ = _change(both, lambda: world.correct(turn))
    trial, _ = _change(
        gateway, lambda: client.start_trial(run, correction, share=0.2, reason="benchmark"), comes=[candidate]
    )
    time.sleep(pause_s)
    _change(gateway, lambda: client.stop_trial(world.model_id, trial.id), goes=[candidate])
    time.sleep(pause_s)
    guards = world.guards()
    released, switched = _change(
        both, lambda: client.release(run, correction), comes=[new], goes=[champion], ended=_switched
    )
    guard = switched, time.monotonic()
    assert (str(released.version), world.guards()) == (new[1], guards + 1), released
    time.sleep(pause_s)
    begin = time.perf_counter()
    _change(both, lambda: client.rollback(world.model_id), comes=[champion], goes=[new])
    seconds = time.perf_counter() - begin
    time.sleep(pause_s)
    return Turn(whole=(start, time.monotonic()), guard=guard, rollback_s=seconds)


def _change(
    timelines: Sequence[Timeline],
    act: Callable[[], Any],
    *,
    comes: Sequence[tuple[str, str]] = (),
    goes: Sequence[tuple[str, str]] = (),
    ended: Callable[[Any], float] = lambda _: time.monotonic(),
) -> tuple[Any, float]:
    """Make a change, before whose begin nothing may answer that comes, and after whose end nothing that goes.

    Return what it gave, and its end.
    """
    begin = time.monotonic()
    for timeline in timelines:
        timeline.begin(comes)
    done = act()
    end = ended(done)
    for timeline in timelines:
        timeline.end((begin, end), goes)
    return done, end


def _switched(release: Release) -> float:
    """Return when callers had the version of a release, before its guard was made, in monotonic seconds."""
    return time.monotonic() - (datetime.now(release.create_time.tzinfo) - release.create_time).total_seconds()


def _figures(
    loads: Sequence[Load], timelines: dict[str, Timeline], turns: Sequence[Turn], begin: float, gate: Span
) -> dict[str, Any]:
    parts = {load.door: _of_door(load, timelines[load.door], turns, begin, gate) for load in loads}
    for load in loads:
        for answer in load.failed[:3]:
            print(f"{load.door}: {answer}", flush=True)
    return {
        "requests": sum(part["requests"] for part in parts.values()),
        "failed_requests": sum(part["failed"] for part in parts.values()),
        "wrong_version": sum(part["wrong_version"] for part in parts.values()),
        "rollback_s": round(statistics.median(turn.rollback_s for turn in turns), 3),
        "gate_s": round(gate[1] - gate[0], 1),
        "guard_s": round(statistics.median(turn.guard[1] - turn.guard[0] for turn in turns), 1),
        **{
            f"p99_{what}_ratio": max(part[f"p99_{what}_ratio"] for part in parts.values())
            for what in ("switch", "guard", "gate", "pooled")
        },
        "doors": parts,
    }


def _of_door(load: Load, timeline: Timeline, turns: Sequence[Turn], begin: float, gate: Span) -> dict[str, Any]:
    """Return the figures of a door; percentiles and their ratios are taken in each turn, of which the median counts."""
    at_gate, before_gate = _p99_ms(load, [gate]), _p99_ms(load, [(begin, gate[0])])
    undisturbed, switch, guard = zip(*(_latencies(load, timeline, turn) for turn in turns), strict=True)
    switch_ratios = [during / before for during, before in zip(switch, undisturbed, strict=True)]
    pooled = _p99_ms(load, [(start, done + _AFTER_S) for start, done in timeline.changes])
    guard_ratios = [during / before for during, before in zip(guard, undisturbed, strict=True)]
    return {
        "requests": len(load.answers),
        "failed": len(load.failed),
        "wrong_version": sum(not timeline.permits(answer) for answer in load.answers if not answer.error),
        "answered_by": _counted(load),
        "p99_calm_ms": round(statistics.median(undisturbed), 2),
        "p99_switch_ms": round(statistics.median(switch), 2),
        "p99_guard_ms": round(statistics.median(guard), 2),
        "p99_gate_ms": round(at_gate, 2),
        "p99_switch_ratio": round(statistics.median(switch_ratios), 2),
        "p99_switch_ratios": [round(ratio, 2) for ratio in switch_ratios],
        "p99_guard_ratio": round(statistics.median(guard_ratios), 2),
        "p99_gate_ratio": round(at_gate / before_gate, 2),
        "p99_pooled_ratio": round(pooled / before_gate, 2),
    }


def _latencies(load: Load, timeline: Timeline, turn: Turn) -> tuple[float, float, float]:
    """Return the 99th percentiles of a turn between its changes, during them, and while its guard was made, in ms."""
    start, end = turn.whole
    changes = [(begin, done + _AFTER_S) for begin, done in timeline.changes if start <= begin < end]
    guard = (turn.guard[0], turn.guard[1] + _AFTER_S)
    busy = sorted([*changes, guard])
    undisturbed = list(zip([start, *(done for _, done in busy)], [*(begin for begin, _ in busy), end], strict=True))
    return _p99_ms(load, undisturbed), _p99_ms(load, changes), _p99_ms(load, [turn.guard])


def _counted(load: Load) -> dict[str, int]:
    names = [f"{answer.model}/{answer.version}" for answer in load.answers if not answer.error]
    return {name: names.count(name) for name in sorted(set(names))}


def _p99_ms(load: Load, spans: Sequence[Span]) -> float:
    """Return the 99th percentile of the latency of what was sent in some spans of time."""
    sent = [answer for span in spans for answer in load.between(*span)]
    return float(np.quantile([1000 * answer.took for answer in sent], 0.99))
