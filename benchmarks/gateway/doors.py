"""Two ways to the same model, Triton itself and the gateway, asked in turns by another process."""

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tritonclient.grpc.aio as triton


@dataclass(frozen=True, kw_only=True)
class Door:
    """An address, and what is said with each request there."""

    address: str
    model: str
    # height, width, channels
    image_shape: tuple[int, int, int]
    metadata: Mapping[str, str] = field(default_factory=dict)


def own_process() -> ProcessPoolExecutor:
    """Return a process for the load, which would wait for the interpreter with the stack otherwise."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def in_turns(
    load: ProcessPoolExecutor, doors: Mapping[str, Door], turns: int, *, batch: int, concurrency: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Return for each door and turn how long each request took, in seconds; doors take turns."""
    found: dict[str, list[list[float]]] = {name: [] for name in doors}
    for turn in range(turns + 1):
        for name, door in doors.items():
            taken = load.submit(_load, door, batch, concurrency, seconds).result()
            if turn:  # the first one warms up
                found[name].append(taken)
    return found


def _load(door: Door, batch: int, concurrency: int, seconds: float) -> list[float]:
    """Keep `concurrency` requests under way for some seconds; return how long each took."""

    async def ask() -> list[float]:
        async with triton.InferenceServerClient(door.address) as client:
            name = (await client.get_model_metadata(door.model)).inputs[0].name
            height, width, channels = door.image_shape
            images = np.random.default_rng(0).random((batch, channels, height, width), np.float32)
            tensor = triton.InferInput(name, list(images.shape), "FP32")
            tensor.set_data_from_numpy(images)
            taken: list[float] = []
            end = time.perf_counter() + seconds

            async def caller() -> None:
                while (begin := time.perf_counter()) < end:
                    await client.infer(door.model, [tensor], headers=dict(door.metadata))
                    taken.append(time.perf_counter() - begin)

            await asyncio.gather(*(caller() for _ in range(concurrency)))
            return taken

    return asyncio.run(ask())


def added_ms(taken: Mapping[str, list[list[float]]], to: str, *, by: str, quantile: float) -> float:
    """Return what one door adds to another, in milliseconds: the median over turns of the differences of a quantile."""
    pairs = zip(taken[by], taken[to], strict=True)
    return round(
        1000 * float(np.median([np.percentile(a, quantile) - np.percentile(b, quantile) for a, b in pairs])), 3
    )
