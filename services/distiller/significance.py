"""Which groups fail more than what lies around them: exact tests, and a bound on false discoveries over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, fisher_exact

from services.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Trial:
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


def q_values(trials: Sequence[Trial]) -> Array:
    """Return for each trial the least false discovery rate at which it counts (Benjamini and Hochberg, 1995)."""
    if not trials:
        return np.zeros(0)
    return np.asarray(false_discovery_control([trial.p_value for trial in trials], method="bh"))
