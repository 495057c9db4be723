"""Shadow traffic of a trial: the challenger answers beside the champion, and the answers are compared."""

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
    """Counts in memory, so that no request waits for Redis."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._seen: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, trial_name: str, **figures: float) -> None:
        """Count for a trial; figures are those of `Trials.count`."""
        for figure, amount in figures.items():
            self._seen[trial_name][figure] += amount  # type: ignore[assignment]  # seconds are not whole
            telemetry.TRIALS.labels(trial_name, figure).inc(amount)

    async def run(self) -> None:
        """Hand over what was counted, for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await retry_while_redis_is_away(self.flush)

    async def flush(self) -> None:
        """Hand over what was counted until now."""
        while self._seen:
            name, figures = self._seen.popitem()
            try:
                await self._trials.count(name, figures)
            except BaseException:
                self._seen[name].update(figures)
                raise


# Comparisons under way at the same time; what is drawn beyond that is dropped and counted, so that a slow challenger
# takes nothing from callers but its own share of Triton.
_AT_ONCE = 4
_DEADLINE_S = 10.0
# In requests whose tensors are in memory of the caller: a challenger would read what is not there any more, and write
# over the answer.
_SHARED = b"shared_memory_region"


class ShadowComparisons:
    """Asks challengers and counts whether they agree."""

    def __init__(self, infer: Any, tally: TrialCounters) -> None:
        self._infer = infer
        self._tally = tally
        self._under_way: set[asyncio.Task[None]] = set()

    def begin(self, trial: trial_pb2.Trial, request: bytes, champion: bytes) -> None:
        """Send a request to the challenger, to be compared with the champion's answer."""
        if len(self._under_way) >= _AT_ONCE or _SHARED in request or classes_of(champion) is None:
            self._tally.add(trial.name, dropped=1)
            return
        task = asyncio.create_task(self._compare(trial, request, champion))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """End what is under way."""
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
    """Return the class of each image (n,) that a serialized ModelInferResponse names.

    None where its numbers are not in it, as with shared memory, or are no float32.
    """
    response = service_pb2.ModelInferResponse.FromString(answer)
    # Triton leaves an empty place for an output that is in shared memory.
    if not any(response.raw_output_contents[:1]) or response.outputs[0].datatype != "FP32":
        return None
    scores = np.frombuffer(response.raw_output_contents[0], np.float32)
    return np.asarray(scores.reshape(-1, response.outputs[0].shape[-1]).argmax(axis=1))
