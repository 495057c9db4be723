"""The gate, a canary, a release and a rollback under steady load, through Triton and through the gateway."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from defuse import Client, Preprocessing
from defuse.v1 import correction_pb2, run_pb2

from benchmarks.release.load import Answer, Load, steady
from benchmarks.stand import Data
from services.corrector.release import Releases
from services.demo import classifier
from services.gateway.book import Book
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog
from services.runtime.inference import InferenceClient
from services.runtime.queue import Queue
from services.runtime.stack import LocalStack

MODEL = "digits"
# After a change, what is still under way belongs to it.
_AFTER_S = 0.5


@dataclass(kw_only=True)
class Timeline:
    """Which versions may answer when, and when something was changed."""

    # (model, version) to the times from when and until when it may answer.
    allowed: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    changes: list[tuple[float, float]] = field(default_factory=list)

    def change(
        self, act: Callable[[], Any], *, comes: Sequence[tuple[str, str]], goes: Sequence[tuple[str, str]]
    ) -> Any:
        """Make a change: what comes may answer from its begin on, what goes until its end."""
        begin = time.monotonic()
        for version in comes:
            self.allowed.setdefault(version, []).append([begin, float("inf")])
        done = act()
        end = time.monotonic()
        for version in goes:
            self.allowed[version][-1][1] = end
        self.changes.append((begin, end))
        return done

    def permits(self, answer: Answer) -> bool:
        """Say whether who answered was allowed to at some moment while the request was under way."""
        spans = self.allowed.get((answer.model, answer.version), [])
        return any(begin <= answer.sent + answer.took and answer.sent <= end for begin, end in spans)


def switch(
    stack: LocalStack,
    home: Path,
    data: Data,
    files: tuple[bytes, bytes],
    *,
    rate: float,
    turns: int,
    pause_s: float,
) -> dict[str, Any]:
    """Return the figures of the gate and of some turns of canary, release and rollback of `files`, before and after.

    `home` is the directory of the stack.
    """
    with Client(stack.gateway) as client:
        world = _World(stack, home, client, data, files)
        loads = {"triton": stack.addresses()["triton"], "gateway": stack.gateway}
        image = world.image()
        timelines = {door: Timeline(allowed={(MODEL, "1"): [[0.0, float("inf")]]}) for door in loads}
        begin = time.monotonic()
        with ExitStack() as block:
            found = [block.enter_context(steady(door, at, MODEL, image, rate=rate)) for door, at in loads.items()]
            time.sleep(pause_s)
            gate = world.ask_gate()
            time.sleep(pause_s)
            rollbacks = [_turn(world, timelines, turn, pause_s) for turn in range(turns)]
        return _figures(found, timelines, rollbacks, begin, gate)


class _World:
    """A served model, and corrections of it as the corrector leaves them."""

    def __init__(self, stack: LocalStack, home: Path, client: Client, data: Data, files: tuple[bytes, bytes]) -> None:
        self._addresses, self.client, self._data, self._file = stack.addresses(), client, data, files[1]
        mean, std = classifier.statistics(data.images["train"])
        classes = [str(label) for label in range(data.classes)]
        client.add_model(MODEL, files[0], classes, Preprocessing(mean=mean, std=std))
        images = {f"x_{split}": images for split, images in data.images.items()}
        np.savez(home / "data.npz", **images, **{f"y_{split}": labels for split, labels in data.labels.items()})
        self._dataset = client.add_dataset(home / "data.npz")
        self._store = ArtifactStore(f"file://{home}/store")
        inference = InferenceClient(self._addresses["triton"])
        self._releases = Releases(self._store, inference, home / "models")

    def image(self) -> Any:
        height, width, channels = self._data.image_shape
        return np.random.default_rng(0).standard_normal((1, channels, height, width)).astype(np.float32)

    def ask_gate(self) -> tuple[float, float]:
        """Have the gate judge the second file; return when it began and ended."""
        begin = time.monotonic()
        self.client.judge(MODEL, self._file, dataset=self._dataset.id)
        return begin, time.monotonic()

    def correct(self, turn: int) -> tuple[str, str, tuple[str, str]]:
        """Leave a finished correction that passed the gate, its candidate served; return run, id and candidate."""
        model = Catalog(self._store).model(f"models/{MODEL}")
        candidate = self._releases.serve_candidate(model, self._file)
        run, name = f"turn-{turn}", "c1"
        correction = correction_pb2.Correction(
            name=f"runs/{run}/corrections/{name}",
            model=model.name,
            base_version=model.champion_version,
            state=correction_pb2.Correction.STATE_SUCCEEDED,
        )
        correction.create_time.GetCurrentTime()
        result = correction.result
        result.candidate, result.candidate_version = candidate.name, candidate.version
        verdict = result.verdict
        verdict.name, verdict.correction = f"{model.name}/verdicts/planted-{turn}", correction.name
        verdict.base_version, verdict.passed = model.champion_version, True
        self._store.write_message(catalog.verdict(verdict.name), verdict)
        self._store.write_message(catalog.run(f"runs/{run}"), run_pb2.Run(name=f"runs/{run}"))
        self._store.write_bytes(catalog.corrected_file(correction.name), self._file)
        self._store.write_message(catalog.correction(correction.name), correction)
        asyncio.run(self._book(correction))
        return run, name, (candidate.name, str(candidate.version))

    async def _book(self, correction: correction_pb2.Correction) -> None:
        queue = Queue(f"redis://{self._addresses['redis']}/0")
        book = Book(queue, correction_pb2.Correction, "corrections", lambda _: True)
        await book.create(correction, [])
        await queue.close()


def _turn(world: _World, timelines: dict[str, Timeline], turn: int, pause_s: float) -> float:
    """Canary, release, rollback; return the seconds of the rollback."""
    client, champion, new = world.client, (MODEL, "1"), (MODEL, str(2 + turn))
    run, correction, candidate = world.correct(turn)
    gateway, triton = timelines["gateway"], timelines["triton"]
    trial = gateway.change(
        lambda: client.start_trial(run, correction, share=0.2, reason="benchmark"), comes=[candidate], goes=[]
    )
    time.sleep(pause_s)
    gateway.change(lambda: client.stop_trial(MODEL, trial.id), comes=[], goes=[candidate])
    time.sleep(pause_s)
    released = _both(triton, gateway, lambda: client.release(run, correction), comes=[new], goes=[champion])
    assert str(released.version) == new[1], released
    time.sleep(pause_s)
    begin = time.perf_counter()
    _both(triton, gateway, lambda: client.rollback(MODEL), comes=[champion], goes=[new])
    seconds = time.perf_counter() - begin
    time.sleep(pause_s)
    return seconds


def _both(one: Timeline, other: Timeline, act: Callable[[], Any], **versions: Any) -> Any:
    """Make a change that both doors see."""
    return one.change(lambda: other.change(act, **versions), **versions)


def _figures(
    loads: Sequence[Load],
    timelines: dict[str, Timeline],
    rollbacks: Sequence[float],
    begin: float,
    gate: tuple[float, float],
) -> dict[str, Any]:
    parts = {load.door: _of_door(load, timelines[load.door], begin, gate) for load in loads}
    for load in loads:
        for answer in load.failed[:3]:
            print(f"{load.door}: {answer}", flush=True)
    return {
        "requests": sum(part["requests"] for part in parts.values()),
        "failed_requests": sum(part["failed"] for part in parts.values()),
        "wrong_version": sum(part["wrong_version"] for part in parts.values()),
        "rollback_s": round(statistics.median(rollbacks), 3),
        "p99_switch_ratio": max(part["p99_switch_ratio"] for part in parts.values()),
        "gate_s": round(gate[1] - gate[0], 1),
        "p99_gate_ratio": max(part["p99_gate_ratio"] for part in parts.values()),
        "doors": parts,
    }


def _of_door(load: Load, timeline: Timeline, begin: float, gate: tuple[float, float]) -> dict[str, Any]:
    during = [one for start, end in timeline.changes for one in load.between(start, end + _AFTER_S)]
    before_ms, during_ms = _p99_ms(load.between(begin, gate[0])), _p99_ms(during)
    gate_ms = _p99_ms(load.between(*gate))
    return {
        "requests": len(load.answers),
        "failed": len(load.failed),
        "wrong_version": sum(not timeline.permits(answer) for answer in load.answers if not answer.error),
        "answered_by": _counted(load),
        "p99_before_ms": round(before_ms, 2),
        "p99_switch_ms": round(during_ms, 2),
        "p99_switch_ratio": round(during_ms / before_ms, 2),
        "p99_gate_ms": round(gate_ms, 2),
        "p99_gate_ratio": round(gate_ms / before_ms, 2),
    }


def _counted(load: Load) -> dict[str, int]:
    names = [f"{answer.model}/{answer.version}" for answer in load.answers if not answer.error]
    return {name: names.count(name) for name in sorted(set(names))}


def _p99_ms(answers: Sequence[Answer]) -> float:
    return float(np.quantile([1000 * answer.took for answer in answers], 0.99))
