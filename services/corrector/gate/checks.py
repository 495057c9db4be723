"""The checks of the gate: each compares a figure with a bound.

A check has an interval as well, and a rule in words. There are two kinds of rule for
two kinds of evidence. The test split has enough images to prove that no accuracy is
lost: a candidate must be non-inferior, and fails in doubt. A class or a region rarely
has enough images. There, a candidate fails when it loses more than the margin and
chance does not explain the loss, over all classes or regions (Holm, Scandinavian
Journal of Statistics 1979). Such a check states the smallest detectable loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binom, norm

from services.arrays import Array
from services.statistics.hypothesis_tests import CONFIDENCE, AccuracyDifference, PairedReadings

Kind = Literal["file", "test", "class", "calibration", "region_gain", "region", "parity", "latency"]
# Probability, over all classes or all regions together, of stopping a candidate as good as the base version.
_FALSE_ALARMS = 0.05
# Loss of test accuracy that must be excluded, as a share.
TEST_MARGIN = 0.01
# Accepted loss of accuracy of a class or a region, as a share. The same correction with other seeds differs by up to
# 0.019 on a class of MNIST, without being worse (docs/reference/benchmarks.md).
CLASS_MARGIN = 0.025
REGION_MARGIN = 0.02
# Accepted increase of miscalibration: a share of the base version's log loss, with a lower bound in nats.
CALIBRATION_SHARE, CALIBRATION_MARGIN = 0.2, 0.01
# Accepted increase of a request's latency, as a share.
LATENCY_MARGIN = 0.15
# Difference that rounding explains, relative to the largest output.
PARITY_BOUND = 1e-3
# Logarithms of the temperatures that are searched; beyond them, confidences are meaningless.
_TEMPERATURES = (-4.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of a check: a figure, its bound, and the outcome.

    `trials` is the number of images, or of pairs of requests, that the figure is computed from.
    """

    kind: Kind
    subject: str = ""
    figure: float = 0.0
    interval: tuple[float, float] | None = None
    bound: float = 0.0
    trials: int = 0
    passed: bool
    rule: str


def file_check(fault: str) -> CheckResult:
    """Return the check of whether the candidate can be compared at all.

    `fault` is empty when it can.
    """
    return CheckResult(
        kind="file",
        passed=not fault,
        rule=fault or "takes and gives what callers of the base version send and expect, and is served",
    )


def accuracy_check(readings: PairedReadings, margin: float = TEST_MARGIN) -> CheckResult:
    """Check whether the test accuracy is non-inferior by a margin."""
    difference = readings.difference
    low, _ = difference.interval()
    return _change(
        "test",
        "",
        difference,
        bound=-margin,
        passed=low > -margin,
        rule=f"non-inferior: the interval of the change lies above -{margin:g}",
    )


def class_checks(readings: PairedReadings, labels: Array, classes: Sequence[str]) -> list[CheckResult]:
    """Check each class with test images for a loss.

    `labels` are class ids (n,).
    """
    present = np.unique(labels).tolist()
    return _losses("class", {classes[label]: readings.take(labels == label) for label in present}, CLASS_MARGIN)


def region_checks(regions: Mapping[str, PairedReadings]) -> list[CheckResult]:
    """Check each region of the bank, by name, for a loss."""
    return _losses("region", regions, REGION_MARGIN)


def gain_check(readings: PairedReadings) -> CheckResult:
    """Check whether the corrected regions are classified better.

    The images must have had no part in training and choice.
    """
    difference = readings.difference
    low, _ = difference.interval()
    return _change(
        "region_gain",
        "",
        difference,
        bound=0.0,
        passed=low > 0,
        rule="a gain: the interval of the change lies above 0"
        if difference.trials
        else "no image that a gain could be shown on: no source of the regions was held out",
    )


def calibration_check(before: Array, after: Array, labels: Array) -> CheckResult:
    """Check whether the candidate is more miscalibrated, beyond chance.

    Inputs are log-probabilities (n, k) and labels (n,). The figure is the increase of the part of the mean log loss
    that one temperature for all images would remove (Guo et al., ICML 2017). It does not depend on accuracy.
    """
    increase = _excess(after, labels) - _excess(before, labels)  # (n,)
    figure = float(increase.mean())
    half = float(norm.ppf((1 + CONFIDENCE) / 2) * increase.std() / math.sqrt(len(increase)))
    bound = max(CALIBRATION_MARGIN, CALIBRATION_SHARE * float(_losses_of(before, labels).mean()))
    return CheckResult(
        kind="calibration",
        figure=figure,
        interval=(figure - half, figure + half),
        bound=bound,
        trials=len(labels),
        passed=figure <= bound or figure - half <= 0,
        rule=f"no increase above {bound:.3g} nats an image that chance does not explain",
    )


def parity_check(executions: str, batch_size: int, one: Array, other: Array) -> CheckResult:
    """Check whether two executions of the candidate agree on a batch (n, k)."""
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    agrees = one.shape == other.shape and bool(np.isfinite(one).all() and np.isfinite(other).all())
    figure = float(np.abs(one - other).max(initial=0.0)) / scale if agrees else 1.0
    return CheckResult(
        kind="parity",
        subject=f"{executions}, batch {batch_size}",
        figure=figure,
        bound=PARITY_BOUND,
        trials=len(one),
        passed=figure <= PARITY_BOUND,
        rule="finite outputs that differ by rounding only, relative to the largest",
    )


def latency_check(batch_size: int, before: Array, after: Array) -> CheckResult:
    """Check whether requests take longer than with the base version.

    Inputs are the seconds (n,) of n alternating requests to each version. The figure is the median ratio of
    neighbouring requests, with the exact interval of a median: a slow phase of the machine slows both versions.
    """
    ratios = np.sort(after / before)
    rank = int(binom.ppf((1 - CONFIDENCE) / 2, len(ratios), 0.5))
    low, high = float(ratios[max(rank - 1, 0)]), float(ratios[min(len(ratios) - rank, len(ratios) - 1)])
    return CheckResult(
        kind="latency",
        subject=f"batch {batch_size}",
        figure=float(np.median(ratios)),
        interval=(low, high),
        bound=1 + LATENCY_MARGIN,
        trials=len(ratios),
        passed=low <= 1 + LATENCY_MARGIN,
        rule=f"not shown to take {1 + LATENCY_MARGIN:g} times as long",
    )


def _losses(kind: Kind, readings: Mapping[str, PairedReadings], margin: float) -> list[CheckResult]:
    differences = {subject: one.difference for subject, one in readings.items()}
    shown = _holm([difference.p_lost() for difference in differences.values()])
    return [
        _change(
            kind,
            subject,
            difference,
            bound=-margin,
            passed=not (beyond_chance and difference.value < -margin),
            rule=f"no loss above {margin:g} that chance does not explain; the smallest that would have shown is "
            f"{max(margin, _least_shown(difference.trials, len(differences))):.3g}",
        )
        for (subject, difference), beyond_chance in zip(differences.items(), shown, strict=True)
    ]


def _change(
    kind: Kind, subject: str, difference: AccuracyDifference, *, bound: float, passed: bool, rule: str
) -> CheckResult:
    return CheckResult(
        kind=kind,
        subject=subject,
        figure=difference.value,
        interval=difference.interval(),
        bound=bound,
        trials=difference.trials,
        passed=passed,
        rule=rule,
    )


def _holm(p_values: Sequence[float]) -> list[bool]:
    """Return which hypotheses are rejected (Holm 1979).

    The method bounds the probability of any false rejection.
    """
    rejected = [False] * len(p_values)
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[position] > _FALSE_ALARMS / (len(p_values) - rank):
            break
        rejected[position] = True
    return rejected


def _least_shown(trials: int, hypotheses: int) -> float:
    """Return the smallest loss that would be detected when nothing is gained.

    It is the number of images that a sign test needs, as a share of the trials.
    """
    return min(1.0, math.ceil(math.log2(hypotheses / _FALSE_ALARMS)) / trials) if trials else 1.0


def _excess(log_probabilities: Array, labels: Array) -> Array:
    """Return each image's (n,) log loss above that at the best temperature."""

    def losses(log_temperature: float) -> Array:
        return _losses_of(log_softmax(log_probabilities / math.exp(log_temperature), axis=1), labels)

    best = minimize_scalar(lambda x: losses(x).mean(), bounds=_TEMPERATURES, method="bounded").x
    return np.asarray(_losses_of(log_probabilities, labels) - losses(best))


def _losses_of(log_probabilities: Array, labels: Array) -> Array:
    return np.asarray(-log_probabilities[np.arange(len(labels)), labels], np.float64)
