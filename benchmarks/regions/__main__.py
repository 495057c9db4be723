"""`python -m benchmarks.regions`: are the regions true? Planted blind spots, present in the data of a run or absent."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.regions.distilling import distilled
from benchmarks.regions.released import released
from benchmarks.regions.scores import scores
from benchmarks.regions.spots import Planted, handed_over, independent, served
from benchmarks.stand import SMOKE, SMOKE_IMAGES, Data, Stand, read, standing
from services.demo.classifier import digits
from services.localstack.stack import StackSettings


def main() -> None:
    """Measure both arms; print one JSON object as the last line."""
    arguments = _arguments()
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    figures: dict[str, Any] = {"data": path.stem, "device": arguments.device, "smoke": arguments.smoke}
    with standing(arguments.device, threads=os.cpu_count() or 1) as stand:
        whole = read(path, limit=SMOKE_IMAGES if arguments.smoke else 0)
        epochs = 2 if arguments.smoke else 3
        planted = served(stand, whole, oracle=independent(stand, whole, epochs=epochs), epochs=epochs)
        for arm in ("present",) if arguments.smoke else ("present", "absent"):
            begin = time.perf_counter()
            found = _measure(stand, whole, planted, arm, smoke=arguments.smoke)
            print(f"{arm}: {json.dumps(found)} ({time.perf_counter() - begin:.0f} s)", flush=True)
            figures |= {f"{name}_{arm}": value for name, value in found.items()}
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--device", default="cpu", help="where torch decodes: cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


def _measure(stand: Stand, whole: Data, planted: Planted, arm: str, *, smoke: bool) -> dict[str, Any]:
    """Search a classifier with planted spots, distill, and score the regions."""
    data = handed_over(whole, planted.spots, absent=arm == "absent")
    dataset = stand.add_dataset(arm, data)
    sections = SMOKE if smoke else {}
    config = stand.configure(planted.model, dataset, search={"draws_per_source": 20}, **sections)
    stand.train_vae(data, config)
    search = stand.prepare(arm, config)
    while search.step():
        pass
    found = distilled(stand, search, kind="error_aware")
    scored = scores(stand, search, found, planted)
    plain = distilled(stand, search, kind="plain")  # takes the place of the first one's files
    return {
        "failures": int(search.counts.failures),
        "search_s": round(search.seconds, 1),
        "distill_s": round(found.seconds, 1),
        **scored,
        "plain_purity": plain.purity(),
        **released(search.failures()),
    }


if __name__ == "__main__":
    main()
