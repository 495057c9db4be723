"""`python -m benchmarks.correct`: is it fixed? Planted blind spots whose images nobody but the benchmark has."""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from defuse.v1 import correction_pb2
from defuse.v1.correction_pb2 import CorrectionConfig, Training

from benchmarks.correct.annotator import Annotator
from benchmarks.correct.arms import OURS, Arm, corrected
from benchmarks.correct.released import RELEASED_EPOCHS, released
from benchmarks.correct.scores import Result, Score, Seed, score, summary
from benchmarks.correct.speed import time_per_image_ratio
from benchmarks.identify.planted import plant
from benchmarks.regions.distilling import distilled
from benchmarks.regions.spots import Planted, handed_over, independent, served
from benchmarks.stand import SMOKE, Data, Search, Stand, read, standing
from services.demo.classifier import digits
from services.gateway.corrections.config import complete
from services.localstack.stack import StackSettings
from services.storage import keys

_LAMBDAS = (0.3, 0.5)
# That of the sweep's defaults which suits these networks: one, to keep the time down.
_LEARNING_RATES = (1e-3,)
_FIRST_SEED = 3
# Every training and every judgement goes through them.
_SMOKE_IMAGES = 1_500


def main() -> None:
    """Measure every way to correct, for each seed; print one JSON object as the last line."""
    arguments = _arguments()
    path = arguments.data or digits(StackSettings().cache.expanduser() / "demo")
    figures: dict[str, Any] = {"data": path.stem, "device": arguments.device, "smoke": arguments.smoke}
    seeds = 1 if arguments.smoke else arguments.seeds
    with standing(arguments.device, threads=os.cpu_count() or 1) as stand:
        whole = read(path, limit=_SMOKE_IMAGES if arguments.smoke else arguments.limit)
        bench = Bench(stand, whole, smoke=arguments.smoke)
        figures |= summary([bench.measure(seed) for seed in range(seeds)])
    turns, images = (1, 256) if arguments.smoke else (15, 1280)
    ratio = time_per_image_ratio(torch.device(arguments.device), turns=turns, images=images, cache=stand.cache)
    print(json.dumps(figures | {"time_per_image_ratio": round(ratio, 3)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correct", description=__doc__)
    parser.add_argument("--data", type=Path, help="an .npz or a zip of class folders; by default 5,000 MNIST digits")
    parser.add_argument("--limit", type=int, default=0, help="use so many images of each split; 0 uses all")
    parser.add_argument("--seeds", type=int, default=3, help="how often, with other classifiers and searches")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    parser.add_argument("--smoke", action="store_true", help="a few seconds on few images: does everything run")
    return parser.parse_args()


class Bench:
    """One data set, in which spots are planted that are absent from what a run and its correction get."""

    def __init__(self, stand: Stand, whole: Data, *, smoke: bool) -> None:
        self._stand, self._whole, self._smoke = stand, whole, smoke
        self._epochs = 2 if smoke else 3
        self._oracle = independent(stand, whole, epochs=self._epochs)
        self._spots = plant(whole)
        self._data = handed_over(whole, self._spots, absent=True)
        self._dataset = stand.add_dataset("absent", self._data)

    def measure(self, seed: int) -> Seed:
        """Plant, search, distill, annotate, and correct in every way; read all results."""
        begin, stand = time.perf_counter(), self._stand
        planted = served(stand, self._whole, oracle=self._oracle, epochs=self._epochs, seed=_FIRST_SEED + seed)
        search = self._searched(planted, seed)
        annotator = Annotator(stand=stand, oracle=self._oracle)
        labelled = annotator.label(distilled(stand, search, kind="error_aware").regions)
        base = stand.store.read_bytes(keys.model_file(planted.model.name, 1))
        results = [
            Result(arm=arm.name, label=arm.label, chosen=arm.chosen, score=self._score(arm.file, planted))
            for arm in self._arms(search, labelled, annotator.decisions, seed)
        ]
        found = Seed(
            before=self._score(base, planted),
            results=results,
            decisions=annotator.decisions,
            labelled=len(labelled),
            failures=int(search.counts.failures),
        )
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s {found}", flush=True)
        return found

    def _searched(self, planted: Planted, seed: int) -> Search:
        sections = SMOKE if self._smoke else {}
        config = self._stand.configure(
            planted.model, self._dataset, search={"draws_per_source": 20}, seed=seed, **sections
        )
        self._stand.train_vae(self._data, config)
        search = self._stand.prepare(f"correct-{seed}", config)
        while search.step():
            pass
        return search

    def _arms(
        self, search: Search, labelled: Sequence[correction_pb2.LabelledRegion], decisions: int, seed: int
    ) -> Iterator[Arm]:
        """Yield ours, then the baselines: with as many decisions, with as many images, and the released recipe."""
        common: dict[str, Any] = {"seed": seed, "region_weights": _LAMBDAS, "learning_rates": _LEARNING_RATES}
        methods: Sequence[Training.Method.ValueType] = OURS
        if self._smoke:
            common |= {"region_weights": [0.5], "epochs": 1, "images_per_region": 32}
            methods = [Training.METHOD_INTERPOLATION]
        yield from corrected(self._stand, search, labelled, name="c1", methods=methods, choosing=True, **common)
        images = complete(CorrectionConfig(**common)).images_per_region * len(labelled)
        for number, (arm, failures) in enumerate((("decisions", decisions), ("images", images)), start=2):
            single = {"methods": [Training.METHOD_UNCLUSTERED], "unclustered_failures": failures}
            for result in corrected(self._stand, search, labelled, name=f"c{number}", **single, **common):
                yield replace(result, name=f"unclustered_equal_{arm}")
            if self._smoke:
                return
        file, _ = released(self._stand, search, epochs=1 if self._smoke else RELEASED_EPOCHS)
        yield Arm(name="released", region_weight=0.01, share=1.0, file=file)

    def _score(self, file: bytes, planted: Planted) -> Score:
        return score(file, planted.model, self._whole, planted)


if __name__ == "__main__":
    main()
