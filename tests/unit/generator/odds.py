"""Sources whose true rates of failure are planted, and searches of them that are played out draw by draw.

The margins of a source are normal around a mean of its own; a margin below 0 is a failure. The j-th draw of a source is
the same whoever makes it and when, so that two ways of sharing out decodes meet the same luck.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from services.generator import allocation
from services.generator.allocation import SourceStatistics

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Odds:
    """The true failure rates of n sources."""

    # (n,) mean of a source's margins
    mean: Array
    # (n, j) deviations of its draws from there
    deviation: Array
    # (n,) what is seen of it before anything is drawn
    reconstruction_margin: Array
    searchable: Array

    @classmethod
    def planted(cls, mean: Array, *, blur: float = 0.5, draws: int = 400, seed: int = 0) -> "Odds":
        """Plant sources of these means, of which the reconstructions tell no more than a blurred, shifted image."""
        random = np.random.default_rng(seed)
        return cls(
            mean=mean,
            deviation=random.standard_normal((len(mean), draws)),
            reconstruction_margin=1.0 + 1.3 * mean + blur * random.standard_normal(len(mean)),
            searchable=np.ones(len(mean), bool),
        )

    @property
    def rate(self) -> Array:
        return np.asarray(ndtr(-self.mean))

    def untouched(self) -> SourceStatistics:
        nothing = np.zeros(len(self.mean))
        count = nothing.astype(np.int32)
        return SourceStatistics(
            searchable=self.searchable,
            reconstruction_margin=self.reconstruction_margin,
            decodes=count,
            failures=count,
            margin_sum=nothing,
            margin_square_sum=nothing,
            runner_up=np.arange(len(self.mean)) % 2,
            confusion_failures=count,
            first_decodes=count,
            first_failures=count,
        )

    def after(self, tally: SourceStatistics, decodes: Array, limit: int = 10**6) -> SourceStatistics:
        """Return the tally after each source was drawn so many times more."""
        place = np.arange(self.deviation.shape[1])
        drawn = (place >= tally.decodes[:, None]) & (place < (tally.decodes + decodes)[:, None])  # (n, j)
        margin = (self.mean[:, None] + self.deviation) * drawn
        failures = np.minimum(tally.failures + (margin < 0).sum(axis=1), limit)
        found = replace(
            tally,
            decodes=tally.decodes + decodes,
            failures=failures,
            margin_sum=tally.margin_sum + margin.sum(axis=1),
            margin_square_sum=tally.margin_square_sum + (margin**2).sum(axis=1),
            confusion_failures=np.bincount(tally.runner_up, failures, 2)[tally.runner_up],
        )
        if tally.decodes.any():
            return found
        return replace(found, first_decodes=found.decodes, first_failures=found.failures)

    def uniform(self, draws: int, limit: int = 10**6) -> SourceStatistics:
        """Search every source so many times."""
        return self.after(self.untouched(), allocation.uniform_allocation(self.searchable, draws), limit)

    def adaptive(self, draws: int, *, rounds: int = 8, limit: int = 10**6) -> SourceStatistics:
        """Search as often on average, in rounds, as the plans of a run say."""
        tally = self.uniform(1, limit)
        for round_ in range(1, rounds):
            left = draws * int(self.searchable.sum()) - int(tally.decodes.sum())
            wanted = allocation.allocate(tally, decodes=left // (rounds - round_), limit=limit, uniform_decodes=draws)
            tally = self.after(tally, wanted, limit)
        return tally
