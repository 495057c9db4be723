"""`python -m benchmarks.monitor`: the cost of monitoring, its losses, and the delay of its alerts."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.guarded import guarded
from benchmarks.monitor import change, hooks
from benchmarks.sections import Section, add_only, measured
from benchmarks.stand import SMOKE_IMAGES, read, standing
from services.demo.classifier import digits
from services.localstack.stack import StackSettings


def main() -> None:
    """Measure the hooks, then the alerts; print one JSON object as the last line."""
    arguments = _arguments()
    smoke = arguments.smoke
    turns, calls, seconds = (1, 100, 2.0) if smoke else (arguments.turns, arguments.calls, arguments.seconds)
    streams, shifted = (2, 2) if smoke else (arguments.streams, 20)
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    data = read(path, limit=SMOKE_IMAGES if smoke else arguments.limit)
    figures: dict[str, Any] = {"data": data.name, "smoke": smoke}

    def changes() -> dict[str, Any]:
        with standing("cpu", threads=os.cpu_count() or 1) as stand:
            world = guarded(stand, data, smoke=smoke)
            return change.figures(stand, data, world, streams=streams, shifted=shifted)

    sections: dict[str, Section] = {
        "cost": lambda: hooks.cost(turns=turns, calls=calls),
        "loss": lambda: hooks.loss(seconds=seconds),
        "change": changes,
    }
    print(json.dumps(figures | measured(sections, arguments.only)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--limit", type=int, default=0, help="use so many images of each split; 0 uses all")
    parser.add_argument("--turns", type=int, default=15, help="how often each channel is asked, one after the other")
    parser.add_argument("--calls", type=int, default=1_000, help="calls of a turn")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long images are sent while the gateway dies")
    parser.add_argument("--streams", type=int, default=200, help="calm streams")
    add_only(parser, ("cost", "loss", "change"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
