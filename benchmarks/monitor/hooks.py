"""The cost of a hook for a call, and its uncounted losses, if any."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from defuse.hooks import DeliveryCounts, Monitor
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from benchmarks.monitor.processors import here
from benchmarks.monitor.servers import MODEL, SHAPE, Gateway, running_classifier, running_gateway

# A bare channel, one with an interceptor that does nothing, one with the hook.
_PLAIN, _PASSING, _HOOKED = "plain", "passing", "hooked"
_QUANTILES = (50, 99)
_THREADS = 4
# So few that a gateway which is away for seconds is more than the hook can wait for.
_CAPACITY = 2_000
_STOPPED_S = 2.0
_CLOSE_S = 300.0


def cost(*, turns: int, calls: int) -> dict[str, float]:
    """Return what the hook adds to a call beside an interceptor that does nothing, and what that one adds.

    In microseconds, medians over turns of the differences of a quantile, while a real gateway takes the reports. The
    program has a processor of its own, as in production, where classifier and gateway are on other machines.
    """
    with running_classifier() as classifier, running_gateway() as gateway, _own_process() as load:
        taken = load.submit(_take_turns, classifier, gateway.address, turns, calls).result()
    added: dict[str, float] = {}
    for quantile in _QUANTILES:
        added[f"hook_added_p{quantile}_us"] = _added_us(taken, _PASSING, by=_HOOKED, quantile=quantile)
        added[f"interception_added_p{quantile}_us"] = _added_us(taken, _PLAIN, by=_PASSING, quantile=quantile)
        added[f"call_p{quantile}_us"] = round(
            1e6 * float(np.median([np.percentile(turn, quantile) for turn in taken[_PLAIN]])), 1
        )
    return added


def loss(*, seconds: float) -> dict[str, Any]:
    """Return what became of images that were sent while the gateway was killed twice and stood still in between.

    `lost` are those that are neither in the store's batches nor counted as dropped.
    """
    with running_classifier() as classifier, running_gateway() as gateway, _own_process() as load:
        over = gateway.home / "over"
        sending = load.submit(_send, classifier, gateway.address, over)
        for trouble in (_restart, _stand_still, _restart):
            time.sleep(seconds / 4)
            trouble(gateway)
        time.sleep(seconds / 4)
        over.touch()
        sent, counts = sending.result()
        stored = gateway.stored()
    dropped = sum(counts.dropped.values())
    return {
        "lost": sent - len(set(stored)) - dropped,
        "stored_twice": len(stored) - len(set(stored)),
        "sent": sent,
        "stored": len(set(stored)),
        "dropped": dict(counts.dropped),
    }


def _restart(gateway: Gateway) -> None:
    gateway.kill()
    gateway.start()


def _stand_still(gateway: Gateway) -> None:
    """Have the gateway take calls and answer none, as one that has too much to do."""
    gateway.send(signal.SIGSTOP)
    time.sleep(_STOPPED_S)
    gateway.send(signal.SIGCONT)


@contextmanager
def _own_process() -> Iterator[ProcessPoolExecutor]:
    """A process for the load, which would wait for the interpreter with the stand otherwise."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as load:
        with here():
            load.submit(int).result()  # the process starts with the first call
        yield load


class _Passing(grpc.UnaryUnaryClientInterceptor):
    """The cost of gRPC's own interception."""

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details, request)


def _take_turns(classifier: str, gateway: str, turns: int, calls: int) -> dict[str, list[list[float]]]:
    """Return for each channel and turn how long each call took, in seconds."""
    with ExitStack() as stack:
        monitor = stack.enter_context(Monitor(gateway))
        channel = stack.enter_context(grpc.insecure_channel(classifier))
        stubs = {
            _PLAIN: oip_grpc.GRPCInferenceServiceStub(channel),
            _PASSING: oip_grpc.GRPCInferenceServiceStub(grpc.intercept_channel(channel, _Passing())),
            _HOOKED: oip_grpc.GRPCInferenceServiceStub(grpc.intercept_channel(channel, monitor)),
        }
        found: dict[str, list[list[float]]] = {name: [] for name in stubs}
        for turn in range(turns + 1):
            for name, stub in stubs.items():
                taken = [_timed(stub) for _ in range(calls)]
                while monitor.counts.waiting:  # the next channel does not pay for what this one left
                    time.sleep(0.01)
                if turn:  # the first one warms up
                    found[name].append(taken)
        return found


def _timed(stub: Any) -> float:
    request = _request()
    begin = time.perf_counter()
    stub.ModelInfer(request)
    return time.perf_counter() - begin


def _send(classifier: str, gateway: str, over: Path) -> tuple[int, DeliveryCounts]:
    """Ask through the hook until a file is there; return how many images were asked about, and what became of them."""
    sent = [0] * _THREADS
    with Monitor(gateway, capacity=_CAPACITY) as monitor, grpc.insecure_channel(classifier) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(grpc.intercept_channel(channel, monitor))

        def ask(thread: int) -> None:
            while not over.exists():
                stub.ModelInfer(_request(f"{thread}.{sent[thread]}"))
                sent[thread] += 1

        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.close(_CLOSE_S)
        return sum(sent), monitor.counts


def _request(request_id: str = "") -> oip.ModelInferRequest:
    height, width, channels = SHAPE
    image = np.zeros((1, channels, height, width), "<f4")
    request = oip.ModelInferRequest(model_name=MODEL, id=request_id, raw_input_contents=[image.tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=image.shape)
    return request


def _added_us(taken: Mapping[str, list[list[float]]], to: str, *, by: str, quantile: float) -> float:
    pairs = zip(taken[by], taken[to], strict=True)
    return round(1e6 * float(np.median([np.percentile(a, quantile) - np.percentile(b, quantile) for a, b in pairs])), 1)
