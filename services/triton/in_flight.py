"""Requests in flight.

There is a fixed number of slots, each with memory that its requests reuse. The transport is the requested one, or the
first that works; it is chosen again when it stops working.
"""

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
from services.runtime import telemetry, tracing
from services.triton.cuda_shared_memory import CudaSharedMemory
from services.triton.system_shared_memory import SystemSharedMemory
from services.triton.transport import (
    AUTO,
    CUDA_SHARED_MEMORY,
    GRPC,
    SYSTEM_SHARED_MEMORY,
    BufferSize,
    Grpc,
    Memory,
    Request,
    Transport,
    TransportRefused,
    TransportSetting,
    is_away,
    is_unknown_region,
    to_defuse_error,
)

# Measured on two shared cores, medians of interleaved rounds, four requests in flight, gRPC against system shared
# memory: 256 images of 28x28, 57,000 against 87,000 images/s (1.3 and 0.5 ms of this process's CPU a batch); 256 of
# 224x224x3, 440 against 1,490; 16 of 28x28, 15,200 against 21,300; single images of 28x28, 1,670 against 1,650.
_BEST_FIRST = (CUDA_SHARED_MEMORY, SYSTEM_SHARED_MEMORY, GRPC)


class TransportChoice:
    """The choice of the transport.

    It is made at first use, and again when the transport stops working. It is safe to use from several threads.
    """

    def __init__(self, wanted: TransportSetting, client: Any, url: str, *, timeout_s: float) -> None:
        makers: dict[str, Callable[[], Transport]] = {
            CUDA_SHARED_MEMORY: lambda: CudaSharedMemory(client, url, timeout_s=timeout_s),
            SYSTEM_SHARED_MEMORY: lambda: SystemSharedMemory(client, url, timeout_s=timeout_s),
            GRPC: Grpc,
        }
        self._wanted = wanted
        self._url = url
        self._all = [makers[name]() for name in (_BEST_FIRST if wanted == AUTO else (wanted,))]
        self._offers = list(self._all)
        self._refusals: dict[str, str] = {}
        self._chosen = False
        self._lock = threading.Lock()

    def name(self) -> str:
        """Return the transport's name.

        Raises Unavailable when Triton does not answer or refuses the requested transport.
        """
        return self._transport().name

    def memory(self, buffer_size: BufferSize) -> Memory:
        """Return memory for a request; raise as `name` does."""
        while True:
            transport = self._transport()
            try:
                return transport.memory(buffer_size)
            except TransportRefused as refusal:
                with self._lock:
                    self._drop(transport, refusal)

    def close(self) -> None:
        for transport in self._all:
            transport.close()

    def _transport(self) -> Transport:
        with self._lock:
            while not self._chosen:
                self._try(self._offers[0])
            return self._offers[0]

    def _try(self, transport: Transport) -> None:
        try:
            transport.probe()
        except TransportRefused as refusal:
            self._drop(transport, refusal)
        else:
            self._chosen = True
            telemetry.log().info(
                "triton_transport",
                transport=transport.name,
                wanted=self._wanted,
                triton=self._url,
                refused=self._refusals,
            )

    def _drop(self, transport: Transport, refusal: TransportRefused) -> None:
        """Switch to the next transport.

        Raises Unavailable without a next one, and the transport is tried again at the next use.
        """
        if transport is not self._offers[0]:
            return  # another thread got the same refusal
        self._chosen = False
        if len(self._offers) == 1:
            raise Unavailable(
                f"DEFUSE_TRITON_TRANSPORT is {transport.name!r}, which does not work: {refusal}; or set it to 'auto'",
                reason="TRANSPORT_REFUSED",
            ) from refusal
        self._refusals[transport.name] = str(refusal)
        self._offers.pop(0)


# How often a request is sent again after Triton restarted.
_RESENDS = 3


class Slot:
    """A slot of the in-flight window, with reused memory."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._lock = threading.Lock()

    def swap(self, memory: Memory | None) -> Memory | None:
        """Replace the memory, and return the previous one to one caller only.

        `close` may be this caller.
        """
        with self._lock:
            before, self._memory = self._memory, memory
        return before


@dataclass(frozen=True, kw_only=True)
class SentRequest:
    """A request under way, with its slot, memory and pending answer."""

    slot: Slot
    memory: Memory
    request: Request
    answer: "Future[Array]"
    span: Span
    resends: int = _RESENDS


class RequestsInFlight:
    """Sends requests, a fixed number at a time.

    It is safe to use from several threads.
    """

    def __init__(self, client: Any, choice: TransportChoice, url: str, *, count: int, timeout_s: float) -> None:
        self._client = client
        self._choice = choice
        self._url = url
        self._timeout_s = timeout_s
        self._slots = [Slot() for _ in range(count)]
        # Last in, first out: a caller with few requests in flight uses few regions.
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()
        self._closed = False
        for slot in self._slots:
            self._free.put(slot)

    def send(self, request: Request, images: Any, write: Callable[[Any, Any], None]) -> "Future[Array]":
        """Wait for a free slot, fill its memory and send the request.

        `write(images, input)` fills the memory. Returns the pending answer.
        """
        slot = self._take()
        try:
            memory = self._memory(slot, request)
            write(memory.accept(images), memory.input(request))
            span = tracing.start_request_span("triton infer", model=request.model_id, version=request.version)
            sent = SentRequest(slot=slot, memory=memory, request=request, answer=Future(), span=span)
            with tracing.end_span_on_error(span):
                self._post(sent)
        except BaseException:
            self._free.put(slot)
            raise
        return sent.answer

    def close(self, grace_s: float) -> None:
        """Release all memory; wait at most `grace_s` seconds for requests under way.

        Later senders get an error.
        """
        self._closed = True
        idle = self._idle(time.monotonic() + grace_s)
        for slot in self._slots:
            if memory := slot.swap(None):
                memory.abandon()
        self._choice.close()
        for slot in idle:
            self._free.put(slot)  # wakes the next waiting sender

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
        memory, buffer_size = slot.swap(None), request.buffer_size
        if memory and not memory.buffer_size.holds(buffer_size):
            buffer_size = buffer_size.joined(memory.buffer_size)
            memory.release()  # first, as there may not be space for both
            memory = None
        memory = memory or self._choice.memory(buffer_size)
        slot.swap(memory)
        return memory

    def _post(self, sent: SentRequest) -> None:
        request = sent.request
        tensor = triton.InferInput(request.input_name, list(request.shape), request.datatype)
        output = triton.InferRequestedOutput(request.output_name)
        sent.memory.bind(request, tensor, output)
        try:
            self._client.async_infer(
                request.model_id,
                [tensor],
                outputs=[output],
                callback=partial(self._answered, sent),
                model_version=str(request.version),
                client_timeout=self._timeout_s,
                headers=tracing.propagation_headers(sent.span),
            )
        except InferenceServerException as error:
            raise to_defuse_error(error, self._url) from error

    def _answered(self, sent: SentRequest, result: Any, error: InferenceServerException | None) -> None:
        """Process an answer in a gRPC thread.

        Other answers need the thread as well, so work that waits is done in another thread.
        """
        if error and is_unknown_region(error):
            again = threading.Thread(target=self._settle, args=[sent, self._send_again], daemon=True)
            self._settle(sent, lambda _: again.start())
        elif error:
            self._settle(sent, partial(self._fail, error))
        else:
            self._settle(sent, lambda _: sent.memory.read(sent.request, result))

    def _settle(self, sent: SentRequest, outcome: Callable[[SentRequest], Array | None]) -> None:
        """Set the answer to an outcome, and free the slot."""
        try:
            logits = outcome(sent)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for it
            self._free.put(sent.slot)
            tracing.end_span(sent.span, error)
            sent.answer.set_exception(error)
        else:
            if logits is not None:
                tracing.end_span(sent.span)
                self._free.put(sent.slot)
                sent.answer.set_result(logits)

    def _fail(self, error: InferenceServerException, sent: SentRequest) -> None:
        if is_away(error):
            self._replace_memory(sent, None)
        raise to_defuse_error(error, self._url) from error

    def _send_again(self, sent: SentRequest) -> None:
        """Send a request again, after a restarted Triton has lost its regions."""
        self._check_open()
        if not sent.resends:
            raise Unavailable(
                f"Triton at {self._url} forgot its shared memory {_RESENDS} times during one request; see its log "
                "it is started again and again",
                reason="TRITON_UNAVAILABLE",
            )
        memory = self._choice.memory(sent.memory.buffer_size)
        memory.input(sent.request)[...] = memory.accept(sent.memory.input(sent.request))
        self._replace_memory(sent, memory)
        self._post(replace(sent, memory=memory, resends=sent.resends - 1))

    @staticmethod
    def _replace_memory(sent: SentRequest, memory: Memory | None) -> None:
        """Replace memory that Triton may still use for an abandoned request."""
        if before := sent.slot.swap(memory):
            before.abandon()
