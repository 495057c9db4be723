"""The guard of a classifier with planted blind spots: false alarms on clean images, recall on held-out failures."""

from dataclasses import dataclass
from typing import Any

from defuse import names
from defuse.guard_outputs import INSIDE, OUTPUTS
from defuse.v1 import annotation_pb2, guard_pb2, tensor_pb2
from scipy.stats import betabinom

from benchmarks.correct.annotator import Annotator
from benchmarks.identify.planted import Spots, plant
from benchmarks.regions.distilling import distilled
from benchmarks.regions.spots import handed_over, independent, served
from benchmarks.stand import SMOKE, Array, Data, Stand
from services.corrector.guard.issuing import Guards
from services.runtime import catalog
from services.runtime.inference import as_floats, preprocess
from services.runtime.sessions import in_batches, onnx_function

_EPOCHS = 3
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """The guarded model, and what was measured."""

    model: str
    figures: dict[str, Any]


def guarded(stand: Stand, whole: Data, *, smoke: bool) -> Guarded:
    """Search a classifier with planted spots, label what is found, have a guard made of it and measure it."""
    epochs = 1 if smoke else _EPOCHS
    oracle, spots = independent(stand, whole, epochs=epochs), plant(whole)
    data = handed_over(whole, spots, absent=True)
    dataset = stand.add_dataset("absent", data)
    model = served(stand, whole, oracle=oracle, epochs=epochs).model
    config = stand.configure(model, dataset, search={"draws_per_source": 20}, seed=0, **(SMOKE if smoke else {}))
    stand.train_vae(data, config)
    search = stand.prepare("guard", config)
    while search.step():
        pass
    regions = distilled(stand, search, kind="error_aware").regions
    for region in Annotator(stand=stand, oracle=oracle).label(regions):
        verdict = annotation_pb2.Annotation(region=region.region, verdict="VERDICT_LABEL", label=region.label)
        stand.store.write_message(f"{catalog.annotations(region.region)}/1.pb", verdict)
    guard = Guards(stand.store, stand.releases).issue(search.run.name)
    spot = _inside(stand, guard, whole, spots)
    return Guarded(model=names.last(model.name), figures=_figures(guard, spot))


def _inside(stand: Stand, guard: guard_pb2.Guard, whole: Data, spots: Spots) -> Array:
    """Say of the real images of the spots, which no part of the system has seen, whether they are inside, (n,)."""
    file = stand.store.read_bytes(catalog.onnx_of(guard.name))
    model = stand.bench.catalog.model(names.parent(guard.name))
    images = whole.images["test"][spots.contain(whole.images["test"], whole.labels["test"])]
    run = onnx_function(file)
    return in_batches(lambda part: run(preprocess(part, model))[OUTPUTS.index(INSIDE)][:, 0], as_floats(images), 256)


def _figures(guard: guard_pb2.Guard, spot: Array) -> dict[str, Any]:
    return {
        "guard_false_alarm_rate": {
            "stated": guard.false_alarm_rate,
            **_rounded(guard.measured_false_alarm_rate),
            "expected": _expected(guard),
        },
        "guard_recall": round(guard.recall.value, 3),
        "guard_recall_images": guard.recall.trials,
        "guard_recall_spot_images": round(float(spot.mean()), 3),
        "guard_misread_recall": _rounded(guard.misread_recall),
        "guard_regions": len(guard.regions),
    }


def _rounded(share: tensor_pb2.Estimate) -> dict[str, float]:
    return {"measured": round(share.value, 4), "low": round(share.low, 4), "high": round(share.high, 4)}


def _expected(guard: guard_pb2.Guard) -> list[float]:
    """Return the interval in which the measured rate of a rightly calibrated guard lies.

    Of images like those of the calibration, a beta distributed share reaches its threshold, and of the measured ones a
    binomial number of these (Vovk, 2012, "Conditional validity of inductive conformal predictors").
    """
    count, images = guard.calibration_images, guard.measured_false_alarm_rate.trials
    above = count + 1 - -(-(1 - guard.false_alarm_rate) * (count + 1) // 1)
    low, high = betabinom.interval(_CONFIDENCE, images, above, count + 1 - above)
    return [round(float(low) / images, 4), round(float(high) / images, 4)]
