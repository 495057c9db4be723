"""Draws that are a pure function of (seed, source, round, draw), so that no way of sharing the work changes them.

Counter-based: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the identity, then the quantile function of the law.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri

Array = npt.NDArray[Any]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# The released code draws each dimension from Beta(50, 50): mean 0.5, sd 0.05, not centred.
_RELEASED_CONCENTRATION = 50.0


def standard_normal(*, seed: int, source: Array, round_: int, draw: Array, dim: int) -> Array:
    """Return standard normal noise (n, dim), one row for each (source, draw)."""
    return np.asarray(ndtri(_uniform(seed, source, round_, draw, dim)))


def released(*, seed: int, source: Array, round_: int, draw: Array, dim: int) -> Array:
    """Return the noise (n, dim) of the authors' released code, for fidelity: every draw is nearly the same shift."""
    uniform = _uniform(seed, source, round_, draw, dim)
    return np.asarray(betaincinv(_RELEASED_CONCENTRATION, _RELEASED_CONCENTRATION, uniform))


def is_held_out(*, seed: int, source: Array, fraction: float) -> Array:
    """Say for each source (n,) whether correction must not see it; a fixed share, drawn by seed and source alone."""
    return np.asarray(_unit(_bits(seed ^ 0x48454C44, source)) < fraction)


def choose(*, seed: int, count: int, limit: int) -> Array:
    """Return the positions of at most `limit` of `count` things, ascending, drawn by seed; all of them for limit 0."""
    positions = np.arange(count, dtype=np.int64)
    if not 0 < limit < count:
        return positions
    order = np.argsort(_bits(seed ^ 0x534F5552, positions), kind="stable")
    return np.sort(order[:limit])


def _uniform(seed: int, source: Array, round_: int, draw: Array, dim: int) -> Array:
    key = _bits(seed, source, np.full(len(source), round_), draw)  # (n,)
    return _unit(_mix(key[:, None] + _GOLDEN * np.arange(1, dim + 1, dtype=np.uint64)))  # (n, dim)


def _bits(seed: int, *parts: Array) -> Array:
    """Hash a seed and arrays of integers (n,) to 64 uniform bits each, (n,)."""
    state = _mix(np.full(len(parts[0]), seed, np.uint64) + _GOLDEN)
    for part in parts:
        state = _mix((state ^ part.astype(np.uint64)) + _GOLDEN)
    return state


def _mix(bits: Array) -> Array:
    """Finalise SplitMix64; multiplication wraps around, as it should."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def _unit(bits: Array) -> Array:
    """Map 64 bits to the open interval (0, 1)."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
