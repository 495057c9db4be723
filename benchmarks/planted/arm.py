"""One arm: a data set, a seed, a plant and a rendering."""

import copy
import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.correct.released import RELEASED_EPOCHS, train_as_released
from benchmarks.planted.data import NamedData, read_data
from benchmarks.planted.networks import (
    LabelledArrays,
    TrainedNetwork,
    refit_head,
    train_afresh,
    tune,
    tuning_schedule,
)
from benchmarks.planted.scores import (
    Answers,
    accuracy,
    after_over_ceiling,
    planted_share,
    region_scores,
    spot_accuracies,
    spot_accuracy,
)
from benchmarks.planted.session import SessionRecord, UserInputs, run_session
from benchmarks.planted.spots import LEAST_IMAGES, SCORED_SPLITS, plan_spots
from benchmarks.stand import SMOKE_IMAGES, Array, Data
from services.onnx_graph.onnx_files import in_batches, onnx_function

MISLABELLED, ABSENT = "mislabelled", "absent"
_ORACLE_SEED = 10_007
_SMOKE_LEAST, _SMOKE_EPOCHS = 3, 4
_ROOT = Path(__file__).parents[2]
_CODE = ("services", "clients/python/defuse", "benchmarks/planted")
_AT_ONCE = 256


@functools.cache
def code_digest() -> str:
    """Return the digest of the measured code and of this benchmark's.

    It is that of the first call: an arm keeps its name while files change.
    """
    content = hashlib.sha256()
    for folder in _CODE:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            content.update(str(file.relative_to(_ROOT)).encode() + file.read_bytes())
    return content.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """The settings of an arm, which decide its result together with the code."""

    source: str
    seed: int
    plant: str = MISLABELLED
    rendering: str = "auto"
    kinds: tuple[str, ...] = ()
    smoke: bool = False

    def file(self, results: Path) -> Path:
        """Return where the arm's result is written."""
        parts = [Path(self.source).stem, str(self.seed), self.plant, self.rendering, *self.kinds]
        return results / f"{'-'.join([*parts, *(['smoke'] if self.smoke else []), code_digest()])}.json"


class PlantedArm:
    """Plants, has Defuse search and correct, and scores what it did."""

    def __init__(self, settings: ArmSettings, cache: Path) -> None:
        self._settings, self._cache = settings, cache
        self._epochs = _SMOKE_EPOCHS if settings.smoke else 0
        self._named: NamedData = read_data(settings.source, limit=SMOKE_IMAGES if settings.smoke else 0)
        data = self._named.data
        self._oracle = self._afresh(_all_splits(data), seed=_ORACLE_SEED)
        self._plan = plan_spots(
            data,
            seed=settings.seed,
            features=self._oracle.penultimate,
            kinds=settings.kinds,
            least=_SMOKE_LEAST if settings.smoke else LEAST_IMAGES,
        )
        if not self._plan.spots:
            raise ValueError(f"nothing is planted: {self._plan.shortfall}")
        self._data = self._plan.handed_over()
        self._handed = LabelledArrays(images=self._data.images["train"], labels=self._data.labels["train"])
        self._deployed = self._train_deployed()

    def measure(self) -> dict[str, Any]:
        """Return all figures of the arm."""
        settings = self._settings
        record = run_session(
            UserInputs(
                deployed=self._deployed,
                oracle=self._oracle,
                data=self._data,
                classes=self._named.classes,
                seed=settings.seed,
                rendering=settings.rendering,
                smoke=settings.smoke,
            )
        )
        return {
            "data": self._named.data.name,
            "seed": settings.seed,
            "plant": settings.plant,
            "rendering": settings.rendering,
            "kinds": list(settings.kinds),
            "smoke": settings.smoke,
            "digest": code_digest(),
            "spots": self._spots(),
            "shortfall": self._plan.shortfall,
            **self._found(record),
            **self._corrected(record),
        }

    def _spots(self) -> list[dict[str, Any]]:
        classes = self._named.classes
        return [
            {
                "kind": spot.kind,
                "direction": "above" if spot.above else "below",
                "true_label": classes[spot.true_label],
                "wrong_label": classes[wrong],
                "training_images": int(spot.members["train"].sum()),
                "before": spot_accuracy(self._deployed.answers, self._plan, spot),
            }
            for spot, (_, wrong) in zip(self._plan.spots, self._confusions(), strict=True)
        ]

    def _found(self, record: SessionRecord) -> dict[str, Any]:
        """Return the figures of the search."""
        preflight, confusions = record.run.preflight, self._confusions()
        return {
            "state": record.run.state,
            "error_reason": record.run.error_reason,
            "rendering_used": record.rendering,
            **region_scores(record.regions, confusions),
            "planted_share": planted_share(record.failures, confusions),
            "failures": len(record.failures),
            "seconds": record.seconds,
            "label_model_accuracy": round(preflight.label_model_accuracy, 4) if preflight else None,
            "reconstructions_lost": round(1 - preflight.reconstruction_accuracy.value, 4) if preflight else None,
        }

    def _corrected(self, record: SessionRecord) -> dict[str, Any]:
        """Return the figures of the correction, its baselines and the ceiling.

        Without a correction, the deployed network stays.
        """
        answers = self._file_answers(record.corrected) if record.corrected else self._deployed.answers
        before, after = (spot_accuracies(of, self._plan) for of in (self._deployed.answers, answers))
        clean_before = self._clean(self._deployed.answers)
        baselines = self._baselines(record)
        figures: dict[str, Any] = {
            "correction": _chosen(record),
            "spots_before": before,
            "spots_after": after,
            "clean_before": round(clean_before, 4),
            "clean_change": round(self._clean(answers) - clean_before, 4),
            "baselines": baselines,
        }
        if self._settings.plant == ABSENT:
            # The deployed network is itself the one trained on the handed-over data.
            jitter = baselines["jitter"]["spots"]
            return figures | {"lift": _differences(after, before), "jitter_lift": _differences(jitter, before)}
        ceiling = spot_accuracies(self._afresh(self._handed, seed=self._settings.seed).answers, self._plan)
        return figures | {"ceiling": ceiling, "after_over_ceiling": after_over_ceiling(after, ceiling)}

    def _baselines(self, record: SessionRecord) -> dict[str, Any]:
        """Return the figures of other ways to train, by name."""
        seed, cache = self._settings.seed, self._cache
        given = record.correction.config["epochs"] if record.correction else 0
        epochs = replace(tuning_schedule(0, seed), epochs=given).epochs_over(len(self._handed.labels))
        arms = {
            "continued": tune(self._deployed, self._handed, epochs=epochs, seed=seed, jitter=False, cache=cache),
            "jitter": tune(self._deployed, self._handed, epochs=epochs, seed=seed, jitter=True, cache=cache),
            "refit": refit_head(self._deployed, self._handed, seed=seed, cache=cache, epochs=self._epochs),
        }
        if record.released:
            arms["released"] = self._released(record.released)
        clean = self._clean(self._deployed.answers)
        return {
            name: {
                "spots": spot_accuracies(arm.answers, self._plan),
                "clean_change": round(self._clean(arm.answers) - clean, 4),
            }
            for name, arm in arms.items()
        }

    def _released(self, regions: tuple[Array, Array]) -> TrainedNetwork:
        made = replace(self._deployed, network=copy.deepcopy(self._deployed.network).eval())
        train_as_released(
            made.network,
            (self._handed.images, self._handed.labels),
            regions,
            made.normalise,
            epochs=1 if self._settings.smoke else RELEASED_EPOCHS,
            seed=self._settings.seed,
        )
        return made

    def _confusions(self) -> list[tuple[int, int]]:
        """Return the confusion of each spot.

        It is the planted one. Where the spot is absent, it is the classifier's most frequent one.
        """
        if self._settings.plant == MISLABELLED:
            return [spot.confusion for spot in self._plan.spots]
        found = []
        for spot in self._plan.spots:
            answers = self._deployed.answers(self._plan.scored_images(spot)).tolist()
            wrong = Counter(answer for answer in answers if answer != spot.true_label).most_common(1)
            found.append((spot.true_label, wrong[0][0] if wrong else spot.wrong_label))
        return found

    def _train_deployed(self) -> TrainedNetwork:
        if self._settings.plant == ABSENT:
            return self._afresh(self._handed, seed=self._settings.seed)
        images, labels = self._plan.mislabelled()
        return self._afresh(LabelledArrays(images=images, labels=labels), seed=self._settings.seed)

    def _afresh(self, data: LabelledArrays, *, seed: int) -> TrainedNetwork:
        classes = len(self._named.classes)
        return train_afresh(data, classes=classes, seed=seed, cache=self._cache, epochs=self._epochs)

    def _clean(self, answers: Answers) -> float:
        return accuracy(answers, self._data.images["test"], self._data.labels["test"])

    def _file_answers(self, file: bytes) -> Answers:
        """Return the predictions of an ONNX file, by ONNX Runtime."""
        run, prepare = onnx_function(file), self._deployed.prepare

        def answers(images: Array) -> Array:
            logits = in_batches(lambda part: run(prepare(part).numpy())[0], images, _AT_ONCE)
            return np.asarray(logits.argmax(axis=1))

        return answers


def _all_splits(data: Data) -> LabelledArrays:
    splits = ("train", *SCORED_SPLITS)
    return LabelledArrays(
        images=np.concatenate([data.images[split] for split in splits]),
        labels=np.concatenate([data.labels[split] for split in splits]),
    )


def _chosen(record: SessionRecord) -> dict[str, Any] | None:
    """Return how the chosen correction was made; None without one."""
    if not record.correction or not record.correction.choice:
        return None
    choice = record.correction.choice
    return {
        "method": choice.method,
        "region_weight": round(choice.region_weight, 4),
        "learning_rate": choice.learning_rate,
        "share": round(choice.share, 4),
        "non_inferior": choice.non_inferior,
    }


def _differences(after: list[float], before: list[float]) -> list[float]:
    return [round(one - other, 4) for one, other in zip(after, before, strict=True)]
