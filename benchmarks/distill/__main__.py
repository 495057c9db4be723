"""`python -m benchmarks.distill`: the mixture against scikit-learn's, its own scaling, and planted truth."""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import torch

from benchmarks.distill.sizes import FULL, SMOKE, Sizes
from benchmarks.distill.speed import against_scikit_learn, bound_gap, scaling, two_processes
from benchmarks.distill.truth import recovery
from benchmarks.sections import Section, add_only, measured


def main() -> None:
    """Run all sections; print one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__)
    parser.add_argument("--device", default="cpu", help="where ours runs: cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few points: does everything run")
    add_only(parser, _sections(SMOKE, "cpu"))
    arguments = parser.parse_args()
    sizes, device = (SMOKE if arguments.smoke else FULL), arguments.device
    figures = {"device": device, "threads": torch.get_num_threads(), "smoke": arguments.smoke}
    print(json.dumps(figures | measured(_sections(sizes, device), arguments.only)))


def _sections(sizes: Sizes, device: str) -> dict[str, Section]:
    return {
        "scikit-learn": partial(against_scikit_learn, sizes, device),
        "bound": partial(bound_gap, sizes),
        "scaling": partial(scaling, sizes, device),
        "memory": partial(memory, sizes),
        "recovery": partial(recovery, sizes),
        "processes": partial(two_processes, sizes),
    }


def memory(sizes: Sizes) -> dict[str, Any]:
    """Measure the anonymous memory of a fit in memory and of one from the store, in processes of their own."""
    ratios = []
    for points, flags in ((sizes.memory, []), (sizes.streamed, ["--streamed"])):
        with tempfile.TemporaryDirectory(prefix="defuse-benchmark-") as folder:
            command = [sys.executable, "-m", "benchmarks.distill.memory", str(points), folder, *flags]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        ratios.append(round(json.loads(done.stdout.splitlines()[-1])["ratio"], 3))
    return {"peak_rss_over_data": ratios[0], "peak_rss_over_data_streamed": ratios[1]}


if __name__ == "__main__":
    main()
