"""Exact binomial intervals and tests, and false discovery rates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, false_discovery_control, fisher_exact

from services.arrays import Array

CONFIDENCE = 0.95


def clopper_pearson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a binomial share (Clopper and Pearson, Biometrika 1934); (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


@dataclass(frozen=True, kw_only=True)
class ErrorRateTest:
    """Fresh decodes of a group beside controls: how many there were, and how many the classifier got wrong."""

    errors: int
    decodes: int
    control_errors: int
    controls: int

    @property
    def excess(self) -> float:
        """Return by how much the error rate is above the controls', in [0, 1]; 0 where it is not."""
        if not self.decodes or not self.controls:
            return 0.0
        return max(0.0, self.errors / self.decodes - self.control_errors / self.controls)

    @property
    def p_value(self) -> float:
        """Return the probability of so many errors or more, were decodes no worse than controls (Fisher's exact test).

        It is 1 where there is nothing to compare with.
        """
        table = [
            [self.errors, self.decodes - self.errors],
            [self.control_errors, self.controls - self.control_errors],
        ]
        return float(fisher_exact(table, alternative="greater").pvalue)


def q_values(trials: Sequence[ErrorRateTest]) -> Array:
    """Return for each trial the least false discovery rate at which it counts (Benjamini and Hochberg, 1995)."""
    if not trials:
        return np.zeros(0)
    return np.asarray(false_discovery_control([trial.p_value for trial in trials], method="bh"))
