"""`python -m benchmarks.gateway`: what does the public door cost, beside asking Triton itself?"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import tritonclient.grpc.aio as triton
from defuse import Client, Preprocessing

from services.demo import classifier
from services.runtime.stack import LocalStack, StackSettings

# The demo's classifier of 28 x 28 images, with weights that nobody trained: a batch of 256 takes it 5 ms or more.
MODEL, SHAPE, CLASSES = "reference", (28, 28, 1), 10
BATCH_SIZES = (1, 32, 256)
CONCURRENCY = 8


def main() -> None:
    """Measure latency and throughput at both doors in turns; print one JSON object as the last line."""
    arguments = _arguments()
    turns, seconds = (2, 0.5) if arguments.smoke else (arguments.turns, arguments.seconds)
    with _doors() as doors:
        latencies = _in_turns(doors, turns, batch=1, concurrency=1, seconds=seconds)
        batch = _in_turns({"direct": doors["direct"]}, 1, batch=256, concurrency=1, seconds=seconds)
        fractions, rates = {}, {}
        for size in BATCH_SIZES:
            found = _in_turns(doors, turns, batch=size, concurrency=CONCURRENCY, seconds=seconds)
            pairs = zip(*(map(len, found[door]) for door in ("gateway", "direct")), strict=True)
            fractions[size] = round(statistics.median(through / direct for through, direct in pairs), 3)
            rates[size] = {door: round(statistics.median(map(len, turns_)) / seconds) for door, turns_ in found.items()}
    figures = {
        "model": "demo classifier, 28x28x1",
        "batch_256_ms": round(1000 * statistics.median(map(statistics.median, batch["direct"])), 2),
        **_added(latencies),
        "throughput_fraction": fractions,
        "requests_per_s": rates,
        "smoke": arguments.smoke,
    }
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="how often each door is asked, one after the other")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does everything run")
    return parser.parse_args()


@contextmanager
def _doors() -> Iterator[dict[str, str]]:
    """Serve the reference model; give the addresses of Triton and the gateway."""
    torch.manual_seed(0)
    file = classifier.to_onnx(classifier.Classifier(SHAPE, CLASSES), SHAPE)
    with tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as home:
        settings = StackSettings(home=Path(home))
        with LocalStack(settings, lambda line: print(line, flush=True)) as stack, Client(stack.gateway) as client:
            client.add_model(MODEL, file, [str(label) for label in range(CLASSES)], Preprocessing(mean=[0], std=[1]))
            yield {"direct": stack.addresses()["triton"], "gateway": stack.gateway}


def _in_turns(
    doors: dict[str, str], turns: int, *, batch: int, concurrency: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Return for each door and turn how long each request took, in seconds; doors take turns."""
    found: dict[str, list[list[float]]] = {door: [] for door in doors}
    # A process of its own: it would wait for the interpreter with the stack's otherwise.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as load:
        for turn in range(turns + 1):
            for door, address in doors.items():
                taken = load.submit(_load, address, batch, concurrency, seconds).result()
                if turn:  # the first one warms up
                    found[door].append(taken)
    return found


def _load(address: str, batch: int, concurrency: int, seconds: float) -> list[float]:
    """Keep `concurrency` requests under way for some seconds; return how long each took."""

    async def ask() -> list[float]:
        async with triton.InferenceServerClient(address) as client:
            name = (await client.get_model_metadata(MODEL)).inputs[0].name
            images = np.random.default_rng(0).random((batch, SHAPE[2], *SHAPE[:2]), np.float32)
            tensor = triton.InferInput(name, list(images.shape), "FP32")
            tensor.set_data_from_numpy(images)
            taken: list[float] = []
            end = time.perf_counter() + seconds

            async def caller() -> None:
                while (begin := time.perf_counter()) < end:
                    await client.infer(MODEL, [tensor])
                    taken.append(time.perf_counter() - begin)

            await asyncio.gather(*(caller() for _ in range(concurrency)))
            return taken

    return asyncio.run(ask())


def _added(latencies: dict[str, list[list[float]]]) -> dict[str, float]:
    """Return what the gateway adds at batch 1, in milliseconds: medians over turns of the differences of quantiles."""
    return {
        f"added_p{quantile}_ms": round(
            1000
            * statistics.median(
                np.percentile(through, quantile) - np.percentile(direct, quantile)
                for through, direct in zip(latencies["gateway"], latencies["direct"], strict=True)
            ),
            3,
        )
        for quantile in (50, 99)
    }


if __name__ == "__main__":
    main()
