"""Shares measured by counting, with exact intervals."""

from scipy.stats import beta

CONFIDENCE = 0.95


def clopper_pearson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a binomial share (Clopper and Pearson, Biometrika 1934); (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high
