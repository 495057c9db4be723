"""Shadow traffic of a trial, which compares the challenger with the champion."""

import asyncio
import time
from collections import Counter, defaultdict
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from defuse.v1 import trial_pb2
from tritonclient.grpc import service_pb2

from services.gateway.trials.trials import REFRESH_S, Trials
from services.runtime import telemetry
from services.runtime.worker import retry_while_redis_is_away


class TrialCounters:
    """Counts a trial's requests in memory, so that none waits for Redis."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._seen: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, trial_name: str, **figures: float) -> None:
        """Add counts for a trial; `figures` are those of `Trials.count`."""
        for figure, amount in figures.items():
            self._seen[trial_name][figure] += amount  # type: ignore[assignment]  # seconds are not whole
            telemetry.TRIALS.labels(trial_name, figure).inc(amount)

    async def run(self) -> None:
        """Flush the counts periodically until the task is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await retry_while_redis_is_away(self.flush)

    async def flush(self) -> None:
        """Add the counts so far to the trials."""
        while self._seen:
            name, figures = self._seen.popitem()
            try:
                await self._trials.count(name, figures)
            except BaseException:
                self._seen[name].update(figures)
                raise


# Comparisons under way at once; further ones are dropped and counted, so that a slow challenger costs callers nothing
# but its share of Triton.
_AT_ONCE = 4
_DEADLINE_S = 10.0
# Marks requests with tensors in the caller's shared memory: a challenger would read stale memory and overwrite the
# answer.
_SHARED = b"shared_memory_region"


class ShadowComparisons:
    """Sends requests to challengers and counts agreement."""

    def __init__(self, infer: Any, tally: TrialCounters) -> None:
        self._infer = infer
        self._tally = tally
        self._under_way: set[asyncio.Task[None]] = set()

    def begin(self, trial: trial_pb2.Trial, request: bytes, champion: bytes) -> None:
        """Start to send a request to the challenger and compare its answer.

        The request is dropped and counted when too many are under way, or when its classes cannot be compared.
        """
        if len(self._under_way) >= _AT_ONCE or _SHARED in request or classes_of(champion) is None:
            self._tally.add(trial.name, dropped=1)
            return
        task = asyncio.create_task(self._compare(trial, request, champion))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """Cancel the comparisons under way."""
        for task in list(self._under_way):
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _compare(self, trial: trial_pb2.Trial, request: bytes, champion: bytes) -> None:
        begin = time.perf_counter()
        self._tally.add(trial.name, challenger_requests=1)
        try:
            challenger = await self._infer(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError:
            self._tally.add(trial.name, challenger_errors=1)
            return
        self._tally.add(trial.name, challenger_seconds=time.perf_counter() - begin)
        one, other = classes_of(champion), classes_of(challenger)
        if one is None or other is None or one.shape != other.shape:
            self._tally.add(trial.name, dropped=1)
        else:
            self._tally.add(trial.name, compared=len(one), agreed=int((one == other).sum()))


def classes_of(answer: bytes) -> npt.NDArray[np.intp] | None:
    """Return the class (n,) of each image in a serialized ModelInferResponse.

    Returns None when the scores are not float32, or not in the message, as with shared memory.
    """
    response = service_pb2.ModelInferResponse.FromString(answer)
    # Triton leaves an empty entry for an output in shared memory.
    if not any(response.raw_output_contents[:1]) or response.outputs[0].datatype != "FP32":
        return None
    scores = np.frombuffer(response.raw_output_contents[0], np.float32)
    return np.asarray(scores.reshape(-1, response.outputs[0].shape[-1]).argmax(axis=1))
