"""The requests in flight: as many slots, each with memory that one request after the other uses."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tritonclient.grpc as triton
from defuse.errors import Cancelled, Unavailable
from opentelemetry.trace import Span
from tritonclient.utils import InferenceServerException

from services.arrays import Array
from services.runtime import tracing
from services.runtime.transport import Memory, Request
from services.runtime.transport_choice import TransportChoice
from services.runtime.triton_errors import is_away, lacks_region, meaning_of

# How often a request is sent again because Triton was started again meanwhile.
_RESENDS = 3


class Slot:
    """A request's place, and the memory that one request after the other uses there."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._lock = threading.Lock()

    def swap(self, memory: Memory | None) -> Memory | None:
        """Put memory in and return what was there, to one caller only: the last one may be `close`."""
        with self._lock:
            before, self._memory = self._memory, memory
        return before


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request on its way."""

    slot: Slot
    memory: Memory
    request: Request
    answer: "Future[Array]"
    span: Span
    resends: int = _RESENDS


class RequestsInFlight:
    """Sends requests, a fixed number at a time. Safe to use from several threads."""

    def __init__(self, client: Any, choice: TransportChoice, url: str, *, count: int, timeout_s: float) -> None:
        self._client = client
        self._choice = choice
        self._url = url
        self._timeout_s = timeout_s
        self._slots = [Slot() for _ in range(count)]
        # Last in, first out: a caller that never has many in flight uses few regions.
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()
        self._closed = False
        for slot in self._slots:
            self._free.put(slot)

    def send(self, request: Request, images: Any, write: Callable[[Any, Any], None]) -> "Future[Array]":
        """Wait for a free slot, let `write(images, input)` fill its memory, send it; return the answer to come."""
        slot = self._take()
        try:
            memory = self._memory(slot, request)
            write(memory.accept(images), memory.input(request))
            span = tracing.request("triton infer", model=request.model_id, version=request.version)
            sent = Sent(slot=slot, memory=memory, request=request, answer=Future(), span=span)
            with tracing.ended_if_it_raises(span):
                self._post(sent)
        except BaseException:
            self._free.put(slot)
            raise
        return sent.answer

    def close(self, grace_s: float) -> None:
        """Give all memory back, waiting `grace_s` at most for requests under way; who wants to send hears of it."""
        self._closed = True
        idle = self._idle(time.monotonic() + grace_s)
        for slot in self._slots:
            if memory := slot.swap(None):
                memory.abandon()
        self._choice.close()
        for slot in idle:
            self._free.put(slot)  # for who waits for one

    def _idle(self, deadline: float) -> list[Slot]:
        idle: list[Slot] = []
        with suppress(queue.Empty):
            while len(idle) < len(self._slots):
                idle.append(self._free.get(timeout=max(0.0, deadline - time.monotonic())))
        return idle

    def _take(self) -> Slot:
        slot = self._free.get()
        try:
            self._check_open()
        except Cancelled:
            self._free.put(slot)
            raise
        return slot

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled(f"the connection to Triton at {self._url} was closed")

    def _memory(self, slot: Slot, request: Request) -> Memory:
        memory, room = slot.swap(None), request.room
        if memory and not memory.room.holds(room):
            room = room.joined(memory.room)
            memory.release()  # first: there need not be space for both
            memory = None
        memory = memory or self._choice.memory(room)
        slot.swap(memory)
        return memory

    def _post(self, sent: Sent) -> None:
        request = sent.request
        tensor = triton.InferInput(request.input_name, list(request.shape), request.datatype)
        output = triton.InferRequestedOutput(request.output_name)
        sent.memory.refer(request, tensor, output)
        try:
            self._client.async_infer(
                request.model_id,
                [tensor],
                outputs=[output],
                callback=partial(self._answered, sent),
                model_version=str(request.version),
                client_timeout=self._timeout_s,
                headers=tracing.headers(sent.span),
            )
        except InferenceServerException as error:
            raise meaning_of(error, self._url) from error

    def _answered(self, sent: Sent, result: Any, error: InferenceServerException | None) -> None:
        """Take an answer, in a thread of gRPC's that other answers need: what waits is left to another thread."""
        if error and lacks_region(error):
            again = threading.Thread(target=self._settle, args=[sent, self._send_again], daemon=True)
            self._settle(sent, lambda _: again.start())
        elif error:
            self._settle(sent, partial(self._fail, error))
        else:
            self._settle(sent, lambda _: sent.memory.read(sent.request, result))

    def _settle(self, sent: Sent, outcome: Callable[[Sent], Array | None]) -> None:
        """Free the slot and settle the answer, unless there is no outcome yet."""
        try:
            logits = outcome(sent)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for it
            self._free.put(sent.slot)
            tracing.ended(sent.span, error)
            sent.answer.set_exception(error)
        else:
            if logits is not None:
                tracing.ended(sent.span)
                self._free.put(sent.slot)
                sent.answer.set_result(logits)

    def _fail(self, error: InferenceServerException, sent: Sent) -> None:
        if is_away(error):
            self._replace_memory(sent, None)
        raise meaning_of(error, self._url) from error

    def _send_again(self, sent: Sent) -> None:
        """Send a request, from memory that Triton knows, once it was started again and forgot what it knew."""
        self._check_open()
        if not sent.resends:
            raise Unavailable(
                f"Triton at {self._url} forgot its shared memory {_RESENDS} times during one request; its log says why "
                "it is started again and again",
                reason="TRITON_UNAVAILABLE",
            )
        memory = self._choice.memory(sent.memory.room)
        memory.input(sent.request)[...] = memory.accept(sent.memory.input(sent.request))
        self._replace_memory(sent, memory)
        self._post(replace(sent, memory=memory, resends=sent.resends - 1))

    @staticmethod
    def _replace_memory(sent: Sent, memory: Memory | None) -> None:
        """Take a slot's memory out of use, which Triton may still read or write for a request that was given up."""
        if before := sent.slot.swap(memory):
            before.abandon()
