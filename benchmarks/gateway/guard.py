"""The guard of a classifier with planted blind spots: false alarms on clean images, recall on failures."""

from typing import Any

from defuse.guard_outputs import INSIDE, OUTPUTS
from defuse.v1 import guard_pb2, tensor_pb2
from scipy.stats import betabinom

from benchmarks.guarded import Guarded
from benchmarks.stand import Array, Data, Stand
from services.arrays import as_floats
from services.onnx_graph.onnx_files import in_batches, onnx_function
from services.storage import keys
from services.triton.preprocessing import preprocess

_CONFIDENCE = 0.95


def figures(stand: Stand, whole: Data, world: Guarded) -> dict[str, Any]:
    """Return the figures of a guard."""
    guard, spot = world.guard, _inside(stand, whole, world)
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


def _inside(stand: Stand, whole: Data, world: Guarded) -> Array:
    """Say of the real images of the spots, which no part of the system has seen, whether they are inside, (n,)."""
    images = whole.images["test"][world.spots.contain(whole.images["test"], whole.labels["test"])]
    run, place = onnx_function(stand.store.read_bytes(keys.onnx_file(world.guard.name))), OUTPUTS.index(INSIDE)
    return in_batches(lambda part: run(preprocess(part, world.model))[place][:, 0], as_floats(images), 256)


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
