"""`python -m benchmarks.monitor`: what does monitoring cost whoever is monitored, and does it lose anything?"""

import argparse
import json
from typing import Any

from benchmarks.monitor import hooks


def main() -> None:
    """Measure the hooks; print one JSON object as the last line."""
    arguments = _arguments()
    turns, calls, seconds = (3, 200, 8.0) if arguments.smoke else (arguments.turns, arguments.calls, arguments.seconds)
    figures: dict[str, Any] = {"smoke": arguments.smoke}
    figures |= hooks.cost(turns=turns, calls=calls)
    figures |= hooks.loss(seconds=seconds)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="how often each channel is asked, one after the other")
    parser.add_argument("--calls", type=int, default=1_000, help="calls of a turn")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long images are sent while the gateway dies")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does everything run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
