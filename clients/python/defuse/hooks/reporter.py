"""The way from what waits to the gateway: split, shown to `redact`, put together, reported, settled."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from defuse.hooks.batches import MOST_BATCH_BYTES, MOST_OBSERVATIONS, Batch, batches
from defuse.hooks.buffer import OBSERVATIONS, TRUTHS, Buffer
from defuse.hooks.complaints import Complaints
from defuse.hooks.courier import Courier
from defuse.hooks.drops import Dropped
from defuse.hooks.logged import Truth
from defuse.hooks.observation import Observation
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

Redact = Callable[[Observation], Observation | None]
# The program's own threads wait for the interpreter while this one has it: it is given back this often, for so long.
# Oftener costs them more than it saves: each time both threads are woken, and calls go slower for longer.
_HELD_S, _GIVEN_S = 1e-3, 50e-6
# A batch is reported so often at most, each time without what it was refused for.
_MOST_REFUSALS = 8


class Reporter:
    """Takes from a buffer and reports; one thread at a time."""

    def __init__(self, buffer: Buffer, courier: Courier, complaints: Complaints, redact: Redact | None) -> None:
        self._buffer = buffer
        self._courier = courier
        self._complaints = complaints
        self._redact = redact
        self._held_since = 0.0

    def report_waiting(self) -> None:
        """Report what waits now; whatever happens to it, each observation is settled once.

        What comes meanwhile waits for others: many small batches would keep this thread, and a gateway, busy all along.
        """
        waiting = self._buffer.queued
        while waiting > 0 and (items := self._buffer.take(MOST_OBSERVATIONS, MOST_BATCH_BYTES)):
            waiting -= sum(item.count for item in items)
            left = Counter({kind: sum(item.count for item in items if item.kind == kind) for kind in _KINDS})
            try:
                self._report(items, left)
            except Exception as error:  # noqa: BLE001  # a defect of ours must not end the reporting
                self._complaints.say_once("defect", "the hook has a defect", error)
            for kind in _KINDS:
                self._settle(left, kind, dropped={"defect": left[kind]} if left[kind] else {})
            self._buffer.release(items)

    def _report(self, items: Sequence[Any], left: Counter[str]) -> None:
        """Report observations, then truths: what a truth is about came before it."""
        for batch in batches(self._messages(items, left)):
            self._send(batch, left)
        for model, truths in _by_model(items).items():
            self._attach(model, truths, left)

    def _messages(self, items: Sequence[Any], left: Counter[str]) -> Iterator[tuple[str, monitor_pb2.Observation]]:
        for item in items:
            if item.kind != OBSERVATIONS:
                continue
            try:
                observations = item.observations()
            except Dropped as drop:
                self._drop(left, OBSERVATIONS, item.count, drop)
                continue
            for observation in observations:
                self._give_way()
                try:
                    shown = self._redacted(observation)
                    message = shown.to_proto()
                except Dropped as drop:
                    self._drop(left, OBSERVATIONS, 1, drop)
                else:
                    yield shown.model, message

    def _redacted(self, observation: Observation) -> Observation:
        """Return what may be reported of an observation; raise Dropped where nothing may, or nobody knows."""
        if self._redact is None:
            return observation
        try:
            shown = self._redact(observation)
        except Exception as error:
            self._complaints.say_once("redact", "`redact` raises, and what it is given is not reported", error)
            raise Dropped("redact", "`redact` raised") from error
        if shown is None:
            raise Dropped("withheld", "")
        if not isinstance(shown, Observation):
            raise Dropped("redact", f"`redact` gave {type(shown).__name__}, neither an Observation nor None")
        return shown

    def _send(self, batch: Batch, left: Counter[str]) -> None:
        """Report a batch; without the observations that it is refused for, unless these are too many to be a chance."""
        for _ in range(_MOST_REFUSALS):
            count = len(batch.ids)
            try:
                stored = min(self._courier.report(batch.requests), count)
            except Dropped as drop:
                last = drop
                if drop.about not in batch.ids or count == 1:
                    break
                self._drop(left, OBSERVATIONS, 1, drop)
                batch = batch.without(drop.about)
            else:
                # The others are stored already, in another batch under the same ids.
                self._settle(left, OBSERVATIONS, stored=stored, dropped={"repeated": count - stored})
                return
        self._drop(left, OBSERVATIONS, len(batch.ids), last)

    def _attach(self, model: str, truths: Sequence[Truth], left: Counter[str]) -> None:
        """Say truths together; where they are refused, each label alone: it may be one that is no class."""
        said = {truth.id: truth.label for truth in truths}
        labels = set(said.values())
        try:
            request = pb.AttachTruthRequest(model=f"models/{model}", truths=said)
            attached = min(self._courier.attach(request), len(said))
        except Dropped as drop:
            if drop.reason != "invalid_argument" or len(labels) == 1:
                self._drop(left, TRUTHS, len(truths), drop)
                return
            for label in labels:
                self._attach(model, [truth for truth in truths if truth.label == label], left)
        else:
            repeated = len(truths) - len(said)
            self._settle(left, TRUTHS, stored=attached, dropped={"unknown": len(said) - attached, "repeated": repeated})

    def _drop(self, left: Counter[str], kind: str, count: int, drop: Dropped) -> None:
        if drop.message:
            self._complaints.say(drop.reason, drop.message)
        self._settle(left, kind, dropped={drop.reason: count})

    def _settle(self, left: Counter[str], kind: str, *, stored: int = 0, dropped: dict[str, int]) -> None:
        some = {reason: count for reason, count in dropped.items() if count}
        self._buffer.settle(kind, stored=stored, dropped=some)
        left[kind] -= stored + sum(some.values())

    def _give_way(self) -> None:
        if time.perf_counter() - self._held_since > _HELD_S:
            time.sleep(_GIVEN_S)
            self._held_since = time.perf_counter()


_KINDS = (OBSERVATIONS, TRUTHS)


def _by_model(items: Sequence[Any]) -> dict[str, list[Truth]]:
    found: dict[str, list[Truth]] = {}
    for item in items:
        if item.kind == TRUTHS:
            found.setdefault(item.model, []).append(item)
    return found
