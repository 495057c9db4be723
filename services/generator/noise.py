"""Noise as a pure function of (seed, source, round, draw).

It does not depend on how work is shared. It is counter-based: SplitMix64 hashes the
identity (Steele, Lea and Flood, OOPSLA 2014), then the quantile function of the
distribution is applied. It is computed on the device of its arguments: the bits are
equal on every device, and the values are equal up to rounding.
"""

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from services.arrays import Array

# The authors' released code draws each dimension from Beta(50, 50): mean 0.5, sd 0.05, not centred.
_RELEASED_CONCENTRATION = 50.0


def standard_normal(*, seed: int, source: Tensor, round_: int, draw: Tensor, dim: int) -> Tensor:
    """Return standard normal noise (n, dim), a row for each (source, draw).

    `source` and `draw` are integers (n,).
    """
    eps: Tensor = torch.special.ndtri(_uniform(seed, source, round_, draw, dim))
    return eps


def released_noise(*, seed: int, source: Tensor, round_: int, draw: Tensor, dim: int) -> Tensor:
    """Return noise (n, dim) as in the authors' released code.

    Every draw is nearly the same shift. Torch does not have this quantile function, so it is computed on the host.
    """
    uniform = _uniform(seed, source, round_, draw, dim)
    noise = betaincinv(_RELEASED_CONCENTRATION, _RELEASED_CONCENTRATION, uniform.cpu().numpy())
    return torch.from_numpy(noise).to(uniform.device)


def is_held_out(*, seed: int, source: Array, fraction: float) -> Array:
    """Return whether each source (n,) is held out of correction.

    A fixed share is held out, determined by seed and source alone.
    """
    return np.asarray(_unit(_bits(seed ^ 0x48454C44, torch.tensor(source))) < fraction)


def choose_positions(*, seed: int, count: int, limit: int) -> Array:
    """Return ascending positions of at most `limit` of `count` items, by seed.

    A limit of 0 means all items.
    """
    if not 0 < limit < count:
        return np.arange(count, dtype=np.int64)
    bits = _bits(seed ^ 0x534F5552, torch.arange(count)).numpy().view(np.uint64)
    return np.sort(np.argsort(bits, kind="stable")[:limit])


def _uniform(seed: int, source: Tensor, round_: int, draw: Tensor, dim: int) -> Tensor:
    key = _bits(seed, source, torch.full_like(source, round_), draw)  # (n,)
    counter = torch.arange(1, dim + 1, device=key.device)
    return _unit(_mix(key[:, None] + _GOLDEN * counter))  # (n, dim)


def _bits(seed: int, *parts: Tensor) -> Tensor:
    """Return a hash of a seed and integers (n,).

    It has 64 uniform bits for each row, as (n,) int64 on the device of the integers.
    """
    state = _mix(torch.full((1,), _signed(seed), device=parts[0].device) + _GOLDEN)  # (1,)
    for part in parts:
        state = _mix((state ^ part) + _GOLDEN)
    return state


def _mix(bits: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64; multiplication wraps around."""
    bits = _shift_right(bits, 30).bitwise_xor_(bits).mul_(_FIRST_FACTOR)
    bits = _shift_right(bits, 27).bitwise_xor_(bits).mul_(_SECOND_FACTOR)
    return _shift_right(bits, 31).bitwise_xor_(bits)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros.

    Torch has no unsigned integers and would repeat the sign.
    """
    return (bits >> by).bitwise_and_((1 << 64 - by) - 1)


def _unit(bits: Tensor) -> Tensor:
    """Return 64 bits mapped to the open interval (0, 1)."""
    return _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53)


def _signed(bits: int) -> int:
    """Return 64 bits as the int64 with the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)
