"""Shares measured by counting, with exact intervals."""

from defuse.v1 import tensor_pb2
from scipy.stats import beta

CONFIDENCE = 0.95


def clopper_pearson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a binomial share (Clopper and Pearson, Biometrika 1934); (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def estimate(successes: int, trials: int) -> tensor_pb2.Estimate:
    """Return a share with its interval as it is stored and sent."""
    low, high = clopper_pearson(successes, trials)
    value = successes / trials if trials else 0.0
    return tensor_pb2.Estimate(value=value, low=low, high=high, successes=successes, trials=trials)
