"""The power of the gate: candidates made worse on purpose, and candidates that differ only by seed."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, cycle, islice
from typing import Any

from defuse.v1 import correction_pb2, model_pb2
from defuse.v1.correction_pb2 import Training

from benchmarks.correct.arms import corrected
from benchmarks.labelled import Labelled
from benchmarks.release import worse
from benchmarks.stand import Data, Stand
from services.corrector.gate.decision import Gate, describe_check
from services.corrector.release_history import ChangeAuthor
from services.storage import keys

# Of the trainings: a sweep's point that suits these networks, for two epochs.
_CONFIG: dict[str, Any] = {"region_weights": [0.3], "learning_rates": [1e-3], "epochs": 2}
_CHAMPION_SEED = 1000
_ANOTHER_SEED = "only another seed"


def power(arena: "Arena", *, each: int) -> dict[str, Any]:
    """Return how many candidates the gate stops: `each` of every way to make one worse, and five times as many good."""
    gate = Gate(arena.stand.store, arena.stand.releases)

    def stopped(way: str, files: Iterable[bytes]) -> list[bool]:
        return [_stops(gate, arena, way, file) for file in files]

    worse_ = {way: stopped(way, islice(files, each)) for way, files in arena.ways().items()}
    good = stopped(_ANOTHER_SEED, arena.by_seed(5 * each))
    return {
        "worse_candidates": sum(map(len, worse_.values())),
        "worse_stopped": sum(map(sum, worse_.values())),
        "good_candidates": len(good),
        "good_stopped": sum(good),
        "stopped_by_way": {way: f"{sum(found)} of {len(found)}" for way, found in worse_.items()},
    }


def _stops(gate: Gate, arena: "Arena", way: str, file: bytes) -> bool:
    """Say whether the gate stops a candidate, and print for what."""
    digest = hashlib.sha256(file).hexdigest()
    arena.stand.store.write_bytes(keys.file(digest), file)
    verdict = gate.judge_file(arena.model.name, digest, arena.dataset)
    failed = "; ".join(describe_check(check) for check in verdict.checks if not check.passed)
    print(f"{way}: {failed or 'passed'}", flush=True)
    return not verdict.passed


class Arena:
    """A champion and its data set, for a short run: no region is made worse, the only good candidate is itself."""

    def __init__(self, stand: Stand, data: Data, dataset: str, model: model_pb2.Model, champion: bytes) -> None:
        self.stand, self.data, self.dataset, self.model, self.champion = stand, data, dataset, model, champion

    @classmethod
    def of_few(cls, stand: Stand, data: Data) -> "Arena":
        """Return one whose champion is trained in a moment."""
        model = stand.register("champion", data, data.labels["train"], seed=0, epochs=6)
        champion = stand.store.read_bytes(keys.model_file(model.name, 1))
        return cls(stand, data, stand.add_dataset("whole", data), model, champion)

    def ways(self) -> dict[str, Iterable[bytes]]:
        """Return files made worse in every way."""
        images, labels = self.data.images["val"], self.data.labels["val"]
        return {
            "one class": worse.one_class(self.champion, self.model, images, labels),
            "calibration": worse.calibration(self.champion),
            "latency": worse.latency(self.champion, self.model),
            "broken export": worse.broken(self.champion),
        }

    def by_seed(self, _: int) -> Iterator[bytes]:
        """Yield candidates that are the champion, but for their seed."""
        yield self.champion


class Searched(Arena):
    """A champion that is a correction of planted spots, with its regions in the bank."""

    def __init__(self, stand: Stand, known: Labelled) -> None:
        """Correct and release what is labelled."""
        super().__init__(stand, known.data, known.dataset, known.model, b"")
        self._known = known
        self.champion = self._trained(known.labels, "c0", seed=_CHAMPION_SEED)
        self._release()

    def ways(self) -> dict[str, Iterable[bytes]]:
        return {**super().ways(), "one region": self._one_region()}

    def by_seed(self, how_many: int) -> Iterator[bytes]:
        for seed in range(how_many):
            yield self._trained(self._known.labels, f"good{seed}", seed=seed)

    def _trained(self, labelled: Sequence[correction_pb2.LabelledRegion], name: str, *, seed: int) -> bytes:
        """Correct the version that was deployed first."""
        methods = [Training.METHOD_ALL_WEIGHTS]
        [arm] = corrected(self.stand, self._known.search, labelled, name=name, methods=methods, seed=seed, **_CONFIG)
        return arm.file

    def _release(self) -> None:
        """Publish the champion."""
        correction = correction_pb2.Correction(
            name=f"{self._known.search.run.name}/corrections/c0", model=self.model.name, base_version=1
        )
        self.stand.store.write_bytes(keys.corrected_file(correction.name), self.champion)
        self.stand.releases.publish(correction, ChangeAuthor(actor="benchmark"))

    def _one_region(self) -> Iterator[bytes]:
        """Yield corrections whose annotator confirmed, for one region, the wrong label that was answered."""
        answered = {region.name: region.predicted_label for region in self._known.regions}
        confirmable = [region for region in self._known.labels if region.label != answered[region.region]]
        for number, wrong in zip(count(), cycle(confirmable)):
            labels = [
                correction_pb2.LabelledRegion(
                    region=region.region, label=answered[region.region] if region is wrong else region.label
                )
                for region in self._known.labels
            ]
            yield self._trained(labels, f"wrong{number}", seed=number)
