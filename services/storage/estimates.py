"""Shares measured by counting, as they are stored and sent."""

from defuse.v1 import tensor_pb2

from services.statistics.intervals import clopper_pearson


def estimate(successes: int, trials: int) -> tensor_pb2.Estimate:
    """Return a share with its interval as it is stored and sent."""
    low, high = clopper_pearson(successes, trials)
    value = successes / trials if trials else 0.0
    return tensor_pb2.Estimate(value=value, low=low, high=high, successes=successes, trials=trials)
