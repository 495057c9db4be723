"""`python -m benchmarks.planted`: are hidden blind spots found and corrected?

With `report`: the medians of the arms that were measured so far.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.planted.arm import ABSENT, MISLABELLED, ArmSettings, PlantedArm, code_digest
from benchmarks.planted.report import read_results, report
from benchmarks.planted.spots import KINDS
from services.localstack.stack import StackSettings


def main() -> None:
    """Measure one arm or report all; the last line is JSON."""
    cache = StackSettings().cache.expanduser() / "benchmarks"
    arguments = _arguments(cache / "planted")
    if arguments.command == "report":
        results, others = read_results(
            arguments.results, digest=arguments.digest or code_digest(), smoke=arguments.smoke
        )
        print(f"{len(results)} arms of this code in {arguments.results}; {others} of other code are left out")
        print(json.dumps(report(results)))
    else:
        print(json.dumps(_measured(arguments, cache)))


def _arguments(results: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("measure", "report"), default="measure")
    parser.add_argument("--data", help="gtsrb, svhn, mnist, clothing, or the path of an .npz")
    parser.add_argument("--seed", type=int, default=0, help="decides classes, kinds, directions and wrong labels")
    parser.add_argument("--plant", choices=(MISLABELLED, ABSENT), default=MISLABELLED)
    parser.add_argument("--rendering", choices=("auto", "residual", "decoder"), default="auto")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=(), help="by default those that suit the data")
    parser.add_argument("--results", type=Path, default=results, help="directory of the result files")
    parser.add_argument("--digest", help="report the arms of this code instead of the present one")
    parser.add_argument("--smoke", action="store_true", help="a minute or two on few images: does everything run")
    arguments = parser.parse_args()
    if arguments.command == "measure" and not arguments.data:
        parser.error("--data is missing")
    return arguments


def _measured(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Return the arm's result.

    It is read from its file if this code measured it before.
    """
    settings = ArmSettings(
        source=arguments.data,
        seed=arguments.seed,
        plant=arguments.plant,
        rendering=arguments.rendering,
        kinds=tuple(sorted(set(arguments.kinds))),
        smoke=arguments.smoke,
    )
    file = settings.file(arguments.results)
    if not file.exists():
        begin = time.perf_counter()
        result = PlantedArm(settings, cache).measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(file)
        print(f"measured in {time.perf_counter() - begin:.0f} s: {file}", flush=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
