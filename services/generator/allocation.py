"""Where the next decodes go: to the sources and directions in which failures are, without losing breadth.

The search goes in rounds. After each, a rate of failure is estimated for every source from its margins and its
failures so far, and the next round's decodes are given out one by one to where they are worth most. Everything here is
a pure function of what all sources gave, in source order, so it does not depend on who searched what.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import ndtr
from scipy.stats import binom
from sklearn.isotonic import IsotonicRegression

from services.arrays import Array

# Decodes of one source in one round beyond which the estimate should be looked at again first, unless the budget is so
# large that all sources must take more.
_MOST_PER_ROUND = 8
# Weight of the margins' rate against the counted failures, in draws.
_PRIOR_DRAWS = 2.0
# Least variances, in squared logits, where too little was seen to estimate them.
_LEAST_VARIANCE = 0.25
# A new source of a confusion without any failure is worth this many more than one of a frequent confusion.
_RARITY = 3.0
# Rates of sources without a failure are guessed too high now and then, so fewer new sources come than expected: without
# this, 0.94 to 0.97 of the breadth of a uniform search was measured.
_MARGIN_OF_BREADTH = 1.15
# Between these the weight of new sources is sought, on a logarithmic scale.
_WEIGHTS = (1e-2, 1e4)
_HALVINGS = 14


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """What the rounds so far gave, as arrays over n sources."""

    # Right as an image and as a reconstruction: worth searching around.
    searchable: Array
    # Logit of the label minus the largest other one, on the unperturbed reconstruction.
    reconstruction_margin: Array
    decodes: Array
    # Failures that passed every check and were confirmed.
    failures: Array
    # Sums over the decodes of a source.
    margin_sum: Array
    margin_square_sum: Array
    # Class id that came next to the label on the reconstruction: what the source is most likely to be taken for.
    runner_up: Array
    # Failures of all sources so far whose confusion is that of this source's label with its runner-up.
    confusion_failures: Array
    # Of the first, uniform round alone.
    first_decodes: Array
    first_failures: Array

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def uniform_allocation(searchable: Array, decodes_per_source: int) -> Array:
    """Give every searchable source the same number of decodes, (n,)."""
    return np.where(searchable, decodes_per_source, 0).astype(np.int32)


def allocate(tally: SourceStatistics, *, decodes: int, limit: int, uniform_decodes: int) -> Array:
    """Return how many of at most `decodes` decodes each source gets next, (n,).

    A decode is worth the failures that it can be expected to add, at most `limit` of a source counting, plus a weight
    times the sources that it can be expected to add. The weight is the least one with which failures come from as many
    different sources, for their number, as a uniform search of `uniform_decodes` a source would find.
    """
    rate = failure_rates(tally)
    open_ = tally.searchable & (tally.failures < limit)
    rows = np.flatnonzero(open_)
    if not len(rows) or decodes <= 0:
        return np.zeros(len(rate), np.int32)
    most = max(_MOST_PER_ROUND, math.ceil(decodes / len(rows)))
    gains = _gains(rate[rows], tally.failures[rows], tally.confusion_failures[rows], limit, most)
    breadth = _MARGIN_OF_BREADTH * uniform_breadth(tally, decodes=uniform_decodes, limit=limit)
    chosen = _with_breadth(gains, tally, breadth, decodes)
    allocation = np.zeros(len(rate), np.int32)
    allocation[rows] = chosen.sum(axis=1)
    return allocation


def failure_rates(tally: SourceStatistics) -> Array:
    """Estimate for each source (n,) the share of its perturbations that are failures.

    Margins of a source are taken as normal around a mean of its own, the means as normal around a line in the margin of
    its reconstruction; line and variances are estimated from all sources (empirical Bayes). The rate that follows is
    the prior of the counted failures.
    """
    count = tally.decodes
    drawn = tally.searchable & (count > 0)
    if not drawn.any():
        return np.where(tally.searchable, ndtr(-tally.reconstruction_margin), 0.0)
    mean = tally.margin_sum / np.maximum(count, 1)
    expected = _line(tally.reconstruction_margin[drawn], mean[drawn], count[drawn])(tally.reconstruction_margin)
    within, between = _variances(tally, mean, expected, drawn)
    precision = 1 / between + count / within
    posterior = (expected / between + tally.margin_sum / within) / precision
    by_margin = ndtr(-posterior / np.sqrt(within + 1 / precision))
    rate = (_PRIOR_DRAWS * by_margin + tally.failures) / (_PRIOR_DRAWS + count)
    return np.where(tally.searchable, np.minimum(rate, 1.0), 0.0)


@dataclass(frozen=True, kw_only=True)
class DirectionSums:
    """Per class (k, ...), sums over decodes of the step x (d) in latent sds and of the change y of the margin."""

    count: Array  # (k,)
    x: Array  # (k, d)
    y: Array  # (k,)
    xy: Array  # (k, d)

    @classmethod
    def of(cls, label: Array, step: Array, change: Array, classes: int) -> "DirectionSums":
        """Sum over decodes with labels (n,), steps (n, d) and changes of the margin (n,)."""
        one_hot = np.zeros((classes, len(label)))
        one_hot[label, np.arange(len(label))] = 1.0
        return cls(
            count=one_hot.sum(axis=1), x=one_hot @ step, y=one_hot @ change, xy=one_hot @ (step * change[:, None])
        )

    def __add__(self, other: "DirectionSums") -> "DirectionSums":
        return DirectionSums(**{name: value + getattr(other, name) for name, value in self.arrays().items()})

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def directions(self) -> Array:
        """Return for each class the direction (k, d) along which the margin rises most; 0 where nothing is known.

        The noise is white, so that the covariance of step and margin is the slope of their regression.
        """
        count = np.maximum(self.count, 1.0)
        slope = self.xy / count[:, None] - (self.x / count[:, None]) * (self.y / count)[:, None]
        length = np.linalg.norm(slope, axis=1, keepdims=True)
        return np.asarray(np.divide(slope, length, out=np.zeros_like(slope), where=length > 0))


def _line(x: Array, y: Array, weight: Array) -> Any:
    """Fit y = a + b x by weighted least squares; b = 1 where x does not vary."""
    centre, level = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = np.average((x - centre) ** 2, weights=weight)
    slope = np.average((x - centre) * (y - level), weights=weight) / spread if spread > 0 else 1.0
    return lambda at: level + slope * (at - centre)


def _variances(tally: SourceStatistics, mean: Array, expected: Array, drawn: Array) -> tuple[float, float]:
    """Return the variance of margins within a source and of the sources' means around the line."""
    count = tally.decodes[drawn]
    residual = float(np.average((mean - expected)[drawn] ** 2, weights=count))
    freedom = int((count - 1).sum())
    if 2 * freedom < len(count):
        # Hardly any source was drawn twice: what scatters around the line is taken as half of each.
        return max(residual / 2, _LEAST_VARIANCE), max(residual / 2, _LEAST_VARIANCE)
    spread = tally.margin_square_sum[drawn] - count * mean[drawn] ** 2
    within = max(float(spread.sum()) / freedom, _LEAST_VARIANCE)
    return within, max(residual - within * len(count) / count.sum(), _LEAST_VARIANCE)


@dataclass(frozen=True, kw_only=True)
class _Gains:
    """Expected gains of the j-th further decode of each open source, (n, j)."""

    failures: Array
    sources: Array
    # Sources, those of rare confusions counted more.
    breadth: Array


def _gains(rate: Array, failures: Array, confusion_failures: Array, limit: int, most: int) -> _Gains:
    earlier = np.arange(most)[None, :]  # (1, j)
    room = (limit - failures)[:, None]  # (n, 1)
    still_counts = binom.cdf(room - 1, earlier, rate[:, None])  # (n, j)
    is_first = np.where(failures[:, None] == 0, (1 - rate[:, None]) ** earlier, 0.0)
    sources = rate[:, None] * is_first
    rarity = 1 + _RARITY / (1 + confusion_failures)
    return _Gains(failures=rate[:, None] * still_counts, sources=sources, breadth=sources * rarity[:, None])


def uniform_breadth(tally: SourceStatistics, *, decodes: int, limit: int) -> float:
    """Return how many different sources for each failure a uniform search of `decodes` a source would find.

    Told from the first round, in which no source was preferred: its share of failures as a falling function of the
    reconstruction's margin. Sources of one margin differ, which this leaves out, so it errs to the side of breadth.
    """
    drawn = tally.searchable & (tally.first_decodes > 0)
    if not tally.first_failures[drawn].any():
        return 1.0
    share = tally.first_failures[drawn] / tally.first_decodes[drawn]
    falling = IsotonicRegression(increasing=False, y_min=0.0, y_max=1.0)
    rate = falling.fit_transform(tally.reconstruction_margin[drawn], share, sample_weight=tally.first_decodes[drawn])
    # P(more than 0 failures), P(more than 1), ...; more than `decodes` there cannot be.
    failures = binom.sf(np.arange(min(limit, decodes))[None, :], decodes, rate[:, None]).sum()
    return float((1 - (1 - rate) ** decodes).sum() / failures)


def _with_breadth(gains: _Gains, tally: SourceStatistics, breadth: float, decodes: int) -> Array:
    """Choose the decodes that are worth most, with the least weight on new sources that keeps the breadth."""
    found, sources = float(tally.failures.sum()), float((tally.failures > 0).sum())

    def broad(chosen: Array) -> bool:
        expected = found + float(gains.failures[chosen].sum())
        return sources + float(gains.sources[chosen].sum()) >= breadth * expected

    chosen = _most_worth(gains, 0.0, decodes)
    if broad(chosen):
        return chosen
    low, high = _WEIGHTS
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if broad(_most_worth(gains, middle, decodes)) else (middle, high)
    return _most_worth(gains, high, decodes)


def _most_worth(gains: _Gains, weight: float, decodes: int) -> Array:
    """Return a mask (n, j) of the `decodes` entries of largest worth, ties in source order; worth falls with j."""
    worth = (gains.failures + weight * gains.breadth).ravel()
    chosen = worth > 0
    if chosen.sum() > decodes:
        least = np.partition(worth, -decodes)[-decodes]
        chosen = worth > least
        chosen[np.flatnonzero(worth == least)[: decodes - chosen.sum()]] = True
    return chosen.reshape(gains.failures.shape)
