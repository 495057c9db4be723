"""`python -m benchmarks.identify`: the failure search against its limit, uniform search and the released recipe."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.identify.bench import FULL, SMOKE, Bench
from benchmarks.identify.memory import searched
from benchmarks.identify.speed import throughput
from benchmarks.identify.truth import planted_share, reconstructions
from benchmarks.identify.where import budget, time_to_failures
from benchmarks.sections import add_only, measured
from benchmarks.stand import read, standing
from services.demo.classifier import digits
from services.localstack.stack import StackSettings

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    section.__name__: section for section in (reconstructions, throughput, budget, time_to_failures, planted_share)
}
# Each search in a process of its own, without the stand.
MEMORY = "memory"


def main() -> None:
    """Run all sections; print one JSON object as the last line."""
    arguments = _arguments()
    sizes = SMOKE if arguments.smoke else FULL
    cache = StackSettings().cache.expanduser() / "demo"
    data = read(arguments.data or digits(cache), limit=sizes.images)
    with standing(arguments.device, threads=arguments.threads) as stand:
        dataset = stand.add_dataset("benchmark", data)
        labels = data.labels["train"]
        model = stand.register("served", data, labels, seed=0, epochs=sizes.classifier_epochs)
        bench = Bench(stand=stand, data=data, dataset=dataset, model=model, sizes=sizes)
        figures: dict[str, Any] = {
            "data": data.name,
            "device": arguments.device,
            "torch_threads": arguments.threads,
            "triton_threads": os.cpu_count(),
            "transport": stand.inference.transport,
            "smoke": arguments.smoke,
        }
        figures |= measured({name: partial(section, bench) for name, section in SECTIONS.items()}, arguments.only)
        if arguments.smoke and MEMORY in arguments.only:
            figures |= searched(stand, data, sizes.sources, trained=100)
    if not arguments.smoke:
        figures |= measured({MEMORY: partial(_memory, arguments)}, arguments.only)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identify", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--device", default="cpu", help="where torch decodes: cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    add_only(parser, [*SECTIONS, MEMORY])
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


def _memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the anonymous memory of a search of ten times as many sources, each in a process of its own."""
    few, peaks = 10_000, []
    for count in (few, 10 * few):
        command = [sys.executable, "-m", "benchmarks.identify.memory", str(count)]
        command += ["--data", str(arguments.data)] if arguments.data else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_rss_anon_mib"])
    growth = peaks[1] / peaks[0] - 1
    return {"peak_rss_anon_mib": peaks, "peak_rss_growth": round(growth, 3), "peak_rss_sources": [few, 10 * few]}


if __name__ == "__main__":
    main()
