"""Allocation of decodes to sources and directions with failures.

The search goes in rounds. After each round, the failure rate of every source is estimated from its margins and its
failures, and the next round's decodes are assigned one by one where they are worth most, as far as the breadth of the
search is kept. All functions depend only on the results of all sources, in source order, so the result does not depend
on how the work was shared.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import ndtr
from scipy.stats import binom
from sklearn.isotonic import IsotonicRegression

from services.arrays import Array

# Decodes of one source in one round; more would be assigned on too old an estimate, unless the budget requires it.
_MOST_PER_ROUND = 8
# Weight of the prior rate, which follows from margins, against counted failures, in draws.
_PRIOR_DRAWS = 2.0
# Least variances, in squared logits, where there are too few draws to estimate them.
_LEAST_VARIANCE = 0.25
# Extra worth of a new source of a confusion without failures, over one of a frequent confusion.
_RARITY = 3.0
# Failure rates of sources without failures are sometimes overestimated, so that fewer new sources are found than
# expected: without this margin, 0.94 to 0.97 of the breadth of a uniform search was measured.
_MARGIN_OF_BREADTH = 1.15
# Bounds between which the weight of new sources is searched, on a logarithmic scale.
_WEIGHTS = (1e-2, 1e4)
_HALVINGS = 14


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """Results of the rounds so far, as arrays over n sources."""

    # Classified correctly as an image and as a reconstruction.
    searchable: Array
    # Logit of the label minus the largest other one, on the unperturbed reconstruction.
    reconstruction_margin: Array
    decodes: Array
    # Failures that passed every check and were confirmed.
    failures: Array
    # Sums over the decodes of a source.
    margin_sum: Array
    margin_square_sum: Array
    # Class with the largest logit beside the label, on the reconstruction: the most likely misclassification.
    runner_up: Array
    # Failures of all sources with the confusion (label, runner-up) of this source.
    confusion_failures: Array
    # Of the first, uniform round alone.
    first_decodes: Array
    first_failures: Array

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def uniform_allocation(searchable: Array, decodes_per_source: int) -> Array:
    """Return the same number of decodes for every searchable source, (n,)."""
    return np.where(searchable, decodes_per_source, 0).astype(np.int32)


def allocate(tally: SourceStatistics, *, decodes: int, limit: int, uniform_decodes: int) -> Array:
    """Return the number of decodes (n,) of each source in the next round.

    They are at most `decodes` in all. A decode is worth its expected new failures, of
    which at most `limit` of a source count, plus a weight times its expected new
    sources. The weight is the least one that keeps the breadth: failures come from as
    many different sources, for their number, as a uniform search of `uniform_decodes` a
    source would find.
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
    """Return the estimated failure rate (n,) of each source's perturbations.

    The margins of a source are modelled as normal around a mean of its own, and the means as normal around a line in
    the margin of the reconstruction. Line and variances are estimated from all sources (empirical Bayes). The resulting
    rate is the prior of the counted failures.
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
    """Sums over decodes by class, from which directions follow.

    They are sums over the step x (d) in latent sds and the change y of the margin.
    """

    count: Array  # (k,)
    x: Array  # (k, d)
    y: Array  # (k,)
    xy: Array  # (k, d)

    @classmethod
    def of(cls, label: Array, step: Array, change: Array, classes: int) -> "DirectionSums":
        """Return the sums of decodes with labels (n,) and steps (n, d).

        `change` (n,) is the change of the margin.
        """
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
        """Return for each class the direction (k, d) of the largest margin rise.

        The direction is 0 without data. The noise is white, so the covariance of step and margin is the slope of their
        regression.
        """
        count = np.maximum(self.count, 1.0)
        slope = self.xy / count[:, None] - (self.x / count[:, None]) * (self.y / count)[:, None]
        length = np.linalg.norm(slope, axis=1, keepdims=True)
        return np.asarray(np.divide(slope, length, out=np.zeros_like(slope), where=length > 0))


def _line(x: Array, y: Array, weight: Array) -> Any:
    """Return y = a + b x, fitted by weighted least squares.

    The slope is 1 when x does not vary.
    """
    centre, level = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = np.average((x - centre) ** 2, weights=weight)
    slope = np.average((x - centre) * (y - level), weights=weight) / spread if spread > 0 else 1.0
    return lambda at: level + slope * (at - centre)


def _variances(tally: SourceStatistics, mean: Array, expected: Array, drawn: Array) -> tuple[float, float]:
    """Return the variances of margins within and between sources.

    The variance between sources is that of their means around the line.
    """
    count = tally.decodes[drawn]
    residual = float(np.average((mean - expected)[drawn] ** 2, weights=count))
    freedom = int((count - 1).sum())
    if 2 * freedom < len(count):
        # Hardly any source was drawn twice: half of the scatter around the line is assigned to each variance.
        return max(residual / 2, _LEAST_VARIANCE), max(residual / 2, _LEAST_VARIANCE)
    spread = tally.margin_square_sum[drawn] - count * mean[drawn] ** 2
    within = max(float(spread.sum()) / freedom, _LEAST_VARIANCE)
    return within, max(residual - within * len(count) / count.sum(), _LEAST_VARIANCE)


@dataclass(frozen=True, kw_only=True)
class _Gains:
    """Expected gains of the j-th further decode of each open source, (n, j)."""

    failures: Array
    sources: Array
    # New sources, with those of rare confusions weighted more.
    breadth: Array


def _gains(rate: Array, failures: Array, confusion_failures: Array, limit: int, most: int) -> _Gains:
    earlier = np.arange(most)[None, :]  # (1, j)
    capacity = (limit - failures)[:, None]  # (n, 1)
    still_counts = binom.cdf(capacity - 1, earlier, rate[:, None])  # (n, j)
    is_first = np.where(failures[:, None] == 0, (1 - rate[:, None]) ** earlier, 0.0)
    sources = rate[:, None] * is_first
    rarity = 1 + _RARITY / (1 + confusion_failures)
    return _Gains(failures=rate[:, None] * still_counts, sources=sources, breadth=sources * rarity[:, None])


def uniform_breadth(tally: SourceStatistics, *, decodes: int, limit: int) -> float:
    """Return the number of sources per failure of a uniform search.

    Such a search makes `decodes` decodes a source. The estimate comes from the first round, which prefers no source:
    the failure rate is a falling function of the reconstruction's margin. Differences between sources of one margin are
    ignored, which overestimates the breadth.
    """
    drawn = tally.searchable & (tally.first_decodes > 0)
    if not tally.first_failures[drawn].any():
        return 1.0
    share = tally.first_failures[drawn] / tally.first_decodes[drawn]
    falling = IsotonicRegression(increasing=False, y_min=0.0, y_max=1.0)
    rate = falling.fit_transform(tally.reconstruction_margin[drawn], share, sample_weight=tally.first_decodes[drawn])
    # P(more than 0 failures), P(more than 1), ...; at most `decodes` are possible.
    failures = binom.sf(np.arange(min(limit, decodes))[None, :], decodes, rate[:, None]).sum()
    return float((1 - (1 - rate) ** decodes).sum() / failures)


def _with_breadth(gains: _Gains, tally: SourceStatistics, breadth: float, decodes: int) -> Array:
    """Choose the most valuable decodes that keep the breadth.

    The weight on new sources is the least possible one.
    """
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
    """Return a mask (n, j) of the `decodes` most valuable entries.

    Worth falls with j, and ties are resolved in source order.
    """
    worth = (gains.failures + weight * gains.breadth).ravel()
    chosen = worth > 0
    if chosen.sum() > decodes:
        least = np.partition(worth, -decodes)[-decodes]
        chosen = worth > least
        chosen[np.flatnonzero(worth == least)[: decodes - chosen.sum()]] = True
    return chosen.reshape(gains.failures.shape)
