"""Exact binomial intervals, paired comparisons, and false discovery rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, binom, false_discovery_control, fisher_exact, norm

from services.arrays import Array

CONFIDENCE = 0.95


def clopper_pearson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a binomial share, (0, 1) without trials.

    The interval is that of Clopper and Pearson (Biometrika 1934).
    """
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


@dataclass(frozen=True, kw_only=True)
class ErrorRateTest:
    """The test of a group's error rate against its controls'.

    It has the numbers of fresh decodes and of controls, and of the misclassified ones among both.
    """

    errors: int
    decodes: int
    control_errors: int
    controls: int

    @property
    def excess(self) -> float:
        """Return the excess of the error rate over the controls'.

        It is in [0, 1], and 0 without decodes or without controls.
        """
        if not self.decodes or not self.controls:
            return 0.0
        return max(0.0, self.errors / self.decodes - self.control_errors / self.controls)

    @property
    def p_value(self) -> float:
        """Return the p-value of Fisher's exact test against the controls.

        It is 1 when there are no decodes or no controls.
        """
        table = [
            [self.errors, self.decodes - self.errors],
            [self.control_errors, self.controls - self.control_errors],
        ]
        return float(fisher_exact(table, alternative="greater").pvalue)


def q_values(trials: Sequence[ErrorRateTest]) -> Array:
    """Return the q-value of each test.

    It is the least false discovery rate at which the test is rejected (Benjamini and Hochberg, 1995).
    """
    if not trials:
        return np.zeros(0)
    return np.asarray(false_discovery_control([trial.p_value for trial in trials], method="bh"))


_NEARLY_1 = 1 - 1e-12


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """The difference in accuracy of two versions on `trials` images."""

    # Images that only the new version, and only the old version, classifies correctly.
    gained: int
    lost: int
    trials: int

    @property
    def value(self) -> float:
        """Return accuracy after minus accuracy before, in [-1, 1]."""
        return (self.gained - self.lost) / self.trials if self.trials else 0.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the score interval of the difference, (-1, 1) without trials.

        Unlike Wald's interval, it keeps its level when few images change, and has a width when none does (Tango,
        Statistics in Medicine 17, 1998).
        """
        if not self.trials:
            return -1.0, 1.0
        quantile = float(norm.ppf((1 + confidence) / 2))
        return self._bound(-1.0, quantile), self._bound(1.0, -quantile)

    def p_value(self) -> float:
        """Return the two-sided p-value of McNemar's exact test."""
        changed = self.gained + self.lost
        return min(1.0, 2 * float(binom.cdf(min(self.gained, self.lost), changed, 0.5))) if changed else 1.0

    def p_lost(self) -> float:
        """Return the one-sided p-value of a loss.

        It is the probability of as many losses if both versions were equal (McNemar, exact).
        """
        changed = self.gained + self.lost
        return float(binom.cdf(self.gained, changed, 0.5)) if changed else 1.0

    def _bound(self, outermost: float, quantile: float) -> float:
        """Return the difference whose score is the quantile.

        It lies between `outermost` and the measured difference.
        """
        if self.value == outermost:
            return outermost
        end = outermost * _NEARLY_1  # at the extreme the score is infinite
        return float(brentq(lambda delta: self._score(delta) - quantile, *sorted((end, self.value))))

    def _score(self, delta: float) -> float:
        """Return Tango's score of a supposed difference (equation 5).

        It is the distance to the measured difference in standard errors.
        """
        n, gained, lost = self.trials, self.gained, self.lost
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        only_before = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)  # its most likely share under that difference
        variance = n * (2 * only_before + delta * (1 - delta))
        difference = gained - lost - n * delta
        if not difference:
            return 0.0
        return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)


@dataclass(frozen=True, kw_only=True)
class PairedReadings:
    """The correctness of two versions on the same images, (n,) bool each."""

    before: Array
    after: Array

    @property
    def difference(self) -> AccuracyDifference:
        return AccuracyDifference(
            gained=int((self.after & ~self.before).sum()),
            lost=int((self.before & ~self.after).sum()),
            trials=len(self.before),
        )

    def take(self, rows: Array) -> "PairedReadings":
        return PairedReadings(before=self.before[rows], after=self.after[rows])
