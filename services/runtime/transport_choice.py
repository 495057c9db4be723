"""Which transport is used: the one that was asked for, or the first that works, found by trying."""

import threading
from collections.abc import Callable
from typing import Any

from defuse.errors import Unavailable

from services.runtime import telemetry
from services.runtime.cuda_shared_memory import CudaSharedMemory
from services.runtime.system_shared_memory import SystemSharedMemory
from services.runtime.transport import (
    AUTO,
    CUDA_SHARED_MEMORY,
    GRPC,
    SYSTEM_SHARED_MEMORY,
    Grpc,
    Memory,
    Refused,
    Room,
    Transport,
    Wanted,
)

# Measured on two shared cores, medians of interleaved rounds, four requests in flight, gRPC against system shared
# memory: 256 images of 28x28, 57,000 against 87,000 images/s (1.3 and 0.5 ms of this process's CPU a batch); 256 of
# 224x224x3, 440 against 1,490; 16 of 28x28, 15,200 against 21,300; single images of 28x28, 1,670 against 1,650.
_BEST_FIRST = (CUDA_SHARED_MEMORY, SYSTEM_SHARED_MEMORY, GRPC)


class TransportChoice:
    """Chosen at first use, and again when what was chosen stops working. Safe to use from several threads."""

    def __init__(self, wanted: Wanted, client: Any, url: str, *, timeout_s: float) -> None:
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
        """Return the transport's name; raise Unavailable if Triton does not answer or refuses what was asked for."""
        return self._transport().name

    def memory(self, room: Room) -> Memory:
        """Return memory for a request; raise as `name` does."""
        while True:
            transport = self._transport()
            try:
                return transport.memory(room)
            except Refused as refusal:
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
            transport.try_out()
        except Refused as refusal:
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

    def _drop(self, transport: Transport, refusal: Refused) -> None:
        """Go on to the next; of the only one its refusal is the answer, and it is tried again at the next use."""
        if transport is not self._offers[0]:
            return  # another thread was refused the same
        self._chosen = False
        if len(self._offers) == 1:
            raise Unavailable(
                f"DEFUSE_TRITON_TRANSPORT is {transport.name!r}, which does not work: {refusal}; or set it to 'auto'",
                reason="TRANSPORT_REFUSED",
            ) from refusal
        self._refusals[transport.name] = str(refusal)
        self._offers.pop(0)
