"""`python -m benchmarks.release`: does the gate mean it, and does a switch drop a request?"""

import argparse
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from defuse import Client

from benchmarks.guarded import with_guard
from benchmarks.labelled import labelled
from benchmarks.release.power import Arena, Searched, power
from benchmarks.release.switch import switch
from benchmarks.release.world import World
from benchmarks.sections import Section, add_only, measured
from benchmarks.stand import SMOKE_IMAGES, Data, read, stand_at
from services.demo import classifier
from services.demo.classifier import digits
from services.localstack.stack import LocalStack, StackSettings


def main() -> None:
    """Measure the switch, then the gate; print one JSON object as the last line."""
    arguments = _arguments()
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    data = read(path, limit=SMOKE_IMAGES if arguments.smoke else arguments.limit)
    figures: dict[str, Any] = {"data": data.name, "rate": arguments.rate, "smoke": arguments.smoke}
    turns, pause_s = (1, 0.5) if arguments.smoke else (arguments.turns, 5.0)
    with tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as home_, _running(home := Path(home_)) as stack:
        stand = stand_at(home, stack.addresses()["triton"], device="cpu", threads=os.cpu_count() or 1)
        known = functools.cache(lambda: labelled(stand, data, smoke=arguments.smoke))

        def switching() -> dict[str, Any]:
            with Client(stack.gateway) as client:
                world = World(stack, stand, client, with_guard(stand, known()), _another_version(data))
                return switch(stack, world, rate=arguments.rate, turns=turns, pause_s=pause_s)

        def judging() -> dict[str, Any]:
            arena = Arena.of_few(stand, data) if arguments.smoke else Searched(stand, known())
            return {"gate_power": power(arena, each=1 if arguments.smoke else arguments.each)}

        sections: dict[str, Section] = {"switch": switching, "gate_power": judging}
        figures |= measured(sections, arguments.only)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--limit", type=int, default=0, help="use so many images of each split; 0 uses all")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second through each door")
    parser.add_argument("--turns", type=int, default=5, help="how often to release and take back")
    parser.add_argument("--each", type=int, default=4, help="candidates of each way to make one worse")
    add_only(parser, ("switch", "gate_power"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


def _running(home: Path) -> LocalStack:
    return LocalStack(StackSettings(home=home), lambda line: print(line, flush=True))


def _another_version(data: Data) -> bytes:
    """Return a classifier that differs from any other."""
    network = classifier.train(
        data.images["train"][:SMOKE_IMAGES],
        data.labels["train"][:SMOKE_IMAGES],
        classes=data.classes,
        seed=1,
        epochs=1,
        on_epoch=lambda *_: None,
    )
    return classifier.to_onnx(network, data.image_shape)


if __name__ == "__main__":
    main()
