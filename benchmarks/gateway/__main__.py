"""`python -m benchmarks.gateway`: the cost of the gateway beside Triton itself, and the findings of the guard."""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from defuse import Client, Preprocessing, names
from defuse.guard_outputs import METADATA

from benchmarks.gateway import guard
from benchmarks.gateway.doors import Door, added_ms, in_turns, own_process
from benchmarks.guarded import guarded
from benchmarks.stand import SMOKE_IMAGES, read, stand_at
from services.demo import classifier
from services.demo.classifier import digits
from services.localstack.stack import LocalStack, StackSettings

# The demo's classifier of 28 x 28 images, with weights that nobody trained: a batch of 256 takes it 5 ms or more.
MODEL, SHAPE, CLASSES = "reference", (28, 28, 1), 10
BATCH_SIZES = (1, 32, 256)
CONCURRENCY = 8


def main() -> None:
    """Measure the door, then the guard; print one JSON object as the last line."""
    arguments = _arguments()
    turns, seconds = (1, 0.3) if arguments.smoke else (arguments.turns, arguments.seconds)
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    data = read(path, limit=SMOKE_IMAGES if arguments.smoke else arguments.limit)
    figures: dict[str, Any] = {"model": "demo classifier, 28x28x1", "data": data.name, "smoke": arguments.smoke}
    with (
        tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as home_,
        _running(home := Path(home_)) as stack,
        own_process() as load,
    ):
        figures |= _door(load, stack, turns, seconds)
        stand = stand_at(home, stack.addresses()["triton"], device="cpu", threads=os.cpu_count() or 1)
        world = guarded(stand, data, smoke=arguments.smoke)
        figures |= guard.figures(stand, data, world)
        plain = Door(address=stack.gateway, model=names.last(world.model.name), image_shape=data.image_shape)
        asking = replace(plain, metadata={METADATA: "true"})
        taken = in_turns(load, {"plain": plain, "asking": asking}, turns, batch=1, concurrency=1, seconds=seconds)
        figures["guard_added_ms"] = added_ms(taken, "plain", by="asking", quantile=50)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--limit", type=int, default=0, help="use so many images of each split; 0 uses all")
    parser.add_argument("--turns", type=int, default=9, help="how often each door is asked, one after the other")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


def _running(home: Path) -> LocalStack:
    return LocalStack(StackSettings(home=home), lambda line: print(line, flush=True))


def _door(load: ProcessPoolExecutor, stack: LocalStack, turns: int, seconds: float) -> dict[str, Any]:
    """Serve the reference model; return what the gateway costs beside Triton."""
    torch.manual_seed(0)
    file = classifier.to_onnx(classifier.DemoClassifier(SHAPE, CLASSES), SHAPE)
    with Client(stack.gateway) as client:
        client.add_model(MODEL, file, [str(label) for label in range(CLASSES)], Preprocessing(mean=[0], std=[1]))
    doors = {
        name: Door(address=address, model=MODEL, image_shape=SHAPE)
        for name, address in (("direct", stack.addresses()["triton"]), ("gateway", stack.gateway))
    }
    alone = in_turns(load, doors, turns, batch=1, concurrency=1, seconds=seconds)
    batch = in_turns(load, {"direct": doors["direct"]}, 1, batch=256, concurrency=1, seconds=seconds)
    fractions, rates = {}, {}
    for size in BATCH_SIZES:
        found = in_turns(load, doors, turns, batch=size, concurrency=CONCURRENCY, seconds=seconds)
        pairs = zip(*(map(len, found[door]) for door in ("gateway", "direct")), strict=True)
        fractions[size] = round(statistics.median(through / direct for through, direct in pairs), 3)
        rates[size] = {door: round(statistics.median(map(len, turns_)) / seconds) for door, turns_ in found.items()}
    return {
        "batch_256_ms": round(1000 * statistics.median(map(statistics.median, batch["direct"])), 2),
        **{f"added_p{q}_ms": added_ms(alone, "direct", by="gateway", quantile=q) for q in (50, 99)},
        "throughput_fraction": fractions,
        "requests_per_s": rates,
    }


if __name__ == "__main__":
    main()
