"""Sequential change detection with a stated expected run length between false alarms.

A Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo, 2024, "E-detectors: a nonparametric framework for sequential
change detection"): `M_t = (M_{t-1} + 1) e_t`, where each `e_t` has, given the past, an expectation of at most 1 while
nothing has changed. Then `M_t - t` is a supermartingale, so that M reaches a threshold only after as many observations
in expectation, whatever else is true of them; so does any mean of such detectors.
"""

import numpy as np

from services.arrays import Array

ODDS_RATIOS = np.array([1.5, 2.0, 4.0, 8.0, 20.0])
"""How much larger a rate may have become: alternatives, each with a detector of its own."""

STAKES = np.array([-1.2, -0.6, -0.3, 0.3, 0.6, 1.2])
"""What is bet on a mean rank above or below one half: alternatives again."""

# Evidence is not counted beyond this: of infinity nothing comes back.
_MOST = 1e300
# Quantile of the normal distribution: how sure it is that a mean rank in calm is as near to one half as is allowed for.
_SURE = 2.6


def rate_factors(hits: Array, bound: Array) -> Array:
    """Return e-values (n, k, alternatives) of observations (n, k), 0 or 1, whose calm rates (k,) are at most `bound`.

    Likelihood ratios of Bernoulli variables: at the bound their expectation is 1, at any rate below it less.
    """
    calm = np.clip(bound, 1e-9, 1 - 1e-9)[:, None]
    odds = calm / (1 - calm) * ODDS_RATIOS
    changed = odds / (1 + odds)  # (k, alternatives)
    return np.asarray(np.where(hits[:, :, None] > 0, changed / calm, (1 - changed) / (1 - calm)))


def rank_factors(ranks: Array, references: int) -> Array:
    """Return e-values (n, 1, alternatives) of ranks (n,), in [0, 1], among so many reference values.

    In calm their mean is one half, up to what the choice of the references makes of it.
    """
    slack = _SURE / np.sqrt(12 * max(1, references))
    return np.asarray(1 + STAKES * (ranks[:, None] - 0.5) - np.abs(STAKES) * slack)[:, None, :]


def accumulated(evidence: Array, factors: Array, told: Array) -> Array:
    """Return the evidence (n, k, alternatives) after each of n observations, from that before the first (k, a).

    An observation that nothing is `told` of, (n,), changes nothing.
    """
    path = np.empty_like(factors)
    for step, factor in enumerate(factors):
        evidence = np.minimum((evidence + 1) * factor, _MOST) if told[step] else evidence
        path[step] = evidence
    return path
