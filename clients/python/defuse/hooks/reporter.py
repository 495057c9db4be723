"""The reporting thread, which redacts, batches and uploads buffered items."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from defuse.hooks.buffer import OBSERVATIONS, TRUTHS, Buffer, Dropped
from defuse.hooks.observation import Observation, TruthLabel
from defuse.hooks.uploader import ThrottledLog, Uploader
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

Redact = Callable[[Observation], Observation | None]
MAX_OBSERVATIONS = 256
MAX_BATCH_BYTES = 4 * 1024 * 1024
# Longest time that an observation waits for others of its batch.
PERIOD_S = 1.0
# The contract allows four times as much, but serialization holds the interpreter.
_MESSAGE_BYTES = 256 * 1024
# The program's own threads wait while this one holds the interpreter: it sleeps for `_GIL_YIELD_S` every `_GIL_HOLD_S`.
# A shorter period costs the program more: every sleep wakes both threads and slows down calls for a while.
_GIL_HOLD_S, _GIL_YIELD_S = 1e-3, 50e-6
# Reports of one batch, each without the observation that the last one was refused for.
_MAX_REPORTS = 8
# Time for the end of the thread after its call was aborted.
_JOIN_S = 1.0
_KINDS = (OBSERVATIONS, TRUTHS)


@dataclass(kw_only=True)
class ReportBatch:
    """Observations of one model, in messages of bounded size.

    Images and scores of a batch have one size, since the gateway accepts or refuses a
    batch as a whole.
    """

    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    observation_ids: set[str] = field(default_factory=set)
    requests: list[pb.ReportRequest] = field(default_factory=list)
    size: int = 0
    _last_size: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.requests.append(pb.ReportRequest(model=f"models/{self.model}", batch_id=self.id))

    def has_capacity(self, observation: monitor_pb2.Observation, size: int) -> bool:
        """Return whether an observation fits; a batch has each id only once."""
        ids = self.observation_ids
        full = len(ids) == MAX_OBSERVATIONS or (ids and self.size + size > MAX_BATCH_BYTES)
        return not full and observation.id not in ids

    def add(self, observation: monitor_pb2.Observation, size: int) -> None:
        """Add an observation of `size` bytes."""
        if self._last_size and self._last_size + size > _MESSAGE_BYTES:
            self.requests.append(pb.ReportRequest())
            self._last_size = 0
        self.requests[-1].observations.append(observation)
        self.observation_ids.add(observation.id)
        self.size += size
        self._last_size += size

    def without(self, observation_id: str) -> "ReportBatch":
        """Return a new batch without one observation."""
        others = ReportBatch(model=self.model)
        for request in self.requests:
            for observation in request.observations:
                if observation.id != observation_id:
                    others.add(observation, observation.ByteSize())
        return others


def batch_observations(observations: Iterable[tuple[str, monitor_pb2.Observation]]) -> Iterator[ReportBatch]:
    """Group (model, observation) pairs into batches of one model and size.

    An observation of a wrong size would make the gateway refuse its batch. A repeated
    id is put into another batch.
    """
    started: dict[tuple[str, int, int, int], ReportBatch] = {}
    for model, observation in observations:
        key = (model, len(observation.input), len(observation.picture), len(observation.scores))
        batch, size = started.get(key) or ReportBatch(model=model), observation.ByteSize()
        if not batch.has_capacity(observation, size):
            yield batch
            batch = ReportBatch(model=model)
        batch.add(observation, size)
        started[key] = batch
    yield from started.values()


class Reporter:
    """Uploads the items of a buffer, in one thread at a time."""

    def __init__(self, buffer: Buffer, uploader: Uploader, log: ThrottledLog, redact: Redact | None) -> None:
        self._buffer = buffer
        self._uploader = uploader
        self._log = log
        self._redact = redact
        self._held_since = 0.0

    def report_queued(self) -> None:
        """Report the items that are queued now, and settle each exactly once.

        Items that arrive meanwhile wait for the next call, because many small batches
        would keep this thread and the gateway busy.
        """
        remaining = self._buffer.queued
        while remaining > 0 and (items := self._buffer.take(MAX_OBSERVATIONS, MAX_BATCH_BYTES)):
            remaining -= sum(item.count for item in items)
            unsettled = Counter({kind: sum(item.count for item in items if item.kind == kind) for kind in _KINDS})
            try:
                self._report(items, unsettled)
            except Exception as error:  # noqa: BLE001  # a defect must not end the thread
                self._log.error_once("defect", "the hook has a defect", error)
            for kind in _KINDS:
                self._settle(unsettled, kind, dropped={"defect": unsettled[kind]} if unsettled[kind] else {})
            self._buffer.release(items)

    def _report(self, items: Sequence[Any], unsettled: Counter[str]) -> None:
        """Report observations before truths, which refer to earlier observations."""
        for batch in batch_observations(self._messages(items, unsettled)):
            self._send(batch, unsettled)
        for model, truths in _truths_by_model(items).items():
            self._attach(model, truths, unsettled)

    def _messages(self, items: Sequence[Any], unsettled: Counter[str]) -> Iterator[tuple[str, monitor_pb2.Observation]]:
        for item in items:
            if item.kind != OBSERVATIONS:
                continue
            try:
                observations = item.observations()
            except Dropped as drop:
                self._drop(unsettled, OBSERVATIONS, item.count, drop)
                continue
            for observation in observations:
                self._yield_interpreter()
                try:
                    redacted = self._redacted(observation)
                    message = redacted.to_proto()
                except Dropped as drop:
                    self._drop(unsettled, OBSERVATIONS, 1, drop)
                else:
                    yield redacted.model, message

    def _redacted(self, observation: Observation) -> Observation:
        """Return the redacted observation.

        Raises Dropped if it is withheld, or if `redact` fails.
        """
        if self._redact is None:
            return observation
        try:
            redacted = self._redact(observation)
        except Exception as error:
            self._log.error_once("redact", "`redact` raises; its observations are not reported", error)
            raise Dropped("redact", "`redact` raised") from error
        if redacted is None:
            raise Dropped("withheld", "")
        if not isinstance(redacted, Observation):
            raise Dropped("redact", f"`redact` returned a {type(redacted).__name__}, neither an Observation nor None")
        return redacted

    def _send(self, batch: ReportBatch, unsettled: Counter[str]) -> None:
        """Report a batch.

        If the gateway names a wrong observation, the batch is sent again without it, a
        few times.
        """
        for _ in range(_MAX_REPORTS):
            count = len(batch.observation_ids)
            try:
                stored = min(self._uploader.report(batch.requests), count)
            except Dropped as drop:
                last = drop
                if drop.observation_id not in batch.observation_ids or count == 1:
                    break
                self._drop(unsettled, OBSERVATIONS, 1, drop)
                batch = batch.without(drop.observation_id)
            else:
                # An earlier batch stored the others under the same ids.
                self._settle(unsettled, OBSERVATIONS, stored=stored, dropped={"repeated": count - stored})
                return
        self._drop(unsettled, OBSERVATIONS, len(batch.observation_ids), last)

    def _attach(self, model: str, truths: Sequence[TruthLabel], unsettled: Counter[str]) -> None:
        """Attach truths; after a refusal, attach those of each label separately."""
        label_by_id = {truth.id: truth.label for truth in truths}
        labels = set(label_by_id.values())
        try:
            request = pb.AttachTruthRequest(model=f"models/{model}", truths=label_by_id)
            attached = min(self._uploader.attach_truth(request), len(label_by_id))
        except Dropped as drop:
            if drop.reason != "invalid_argument" or len(labels) == 1:
                self._drop(unsettled, TRUTHS, len(truths), drop)
                return
            for label in labels:
                self._attach(model, [truth for truth in truths if truth.label == label], unsettled)
        else:
            dropped = {"unknown": len(label_by_id) - attached, "repeated": len(truths) - len(label_by_id)}
            self._settle(unsettled, TRUTHS, stored=attached, dropped=dropped)

    def _drop(self, unsettled: Counter[str], kind: str, count: int, drop: Dropped) -> None:
        if drop.message:
            self._log.warn(drop.reason, drop.message)
        self._settle(unsettled, kind, dropped={drop.reason: count})

    def _settle(self, unsettled: Counter[str], kind: str, *, stored: int = 0, dropped: dict[str, int]) -> None:
        nonzero = {reason: count for reason, count in dropped.items() if count}
        self._buffer.settle(kind, stored=stored, dropped=nonzero)
        unsettled[kind] -= stored + sum(nonzero.values())

    def _yield_interpreter(self) -> None:
        if time.perf_counter() - self._held_since > _GIL_HOLD_S:
            time.sleep(_GIL_YIELD_S)
            self._held_since = time.perf_counter()


def _truths_by_model(items: Sequence[Any]) -> dict[str, list[TruthLabel]]:
    truths: dict[str, list[TruthLabel]] = {}
    for item in items:
        if item.kind == TRUTHS:
            truths.setdefault(item.model, []).append(item)
    return truths


class ReporterThread:
    """A daemon thread that runs a reporter.

    It runs once per period, and at once for a full batch.
    """

    def __init__(self, reporter: Reporter, uploader: Uploader) -> None:
        self._reporter = reporter
        self._uploader = uploader
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it was started before."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="defuse-monitor", daemon=True)
                    thread.start()
                    self._thread = thread

    def notify(self, queued: int) -> None:
        """Wake the thread when a batch is full.

        Fewer observations wait for the period, because each wake-up costs the caller.
        """
        if queued >= MAX_OBSERVATIONS and not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Report queued items for at most `timeout_s` seconds, then end the thread."""
        self._closing.set()
        self._wake.set()
        self._uploader.hurry()
        if self._thread:
            self._thread.join(timeout_s)
        self._uploader.close()
        if self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(PERIOD_S)
            self._wake.clear()
            self._reporter.report_queued()
        self._reporter.report_queued()
