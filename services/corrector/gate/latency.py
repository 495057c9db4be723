"""How long requests to two versions take, turn by turn."""

import time

import numpy as np

from services.arrays import Array
from services.corrector.gate.version import Version

# Turns for each batch size; fewer where they would take longer than this in all, but some.
_TURNS, _LEAST_TURNS, _MOST_S = 60, 8, 15.0
# Requests to each before the first turn counts.
_WARM_UP = 3


def seconds(before: Version, after: Version, images: Array) -> tuple[Array, Array]:
    """Return how long the same request takes with each version, in turns, (n,) seconds each.

    Images (m, c, h, w) in [0, 1] are one request. Who comes first changes from turn to turn.
    """
    versions = (before, after)
    for version in versions * _WARM_UP:
        version.classify(images)
    taken: list[list[float]] = [[], []]
    end = time.monotonic() + _MOST_S
    while len(taken[0]) < _TURNS and (len(taken[0]) < _LEAST_TURNS or time.monotonic() < end):
        first = len(taken[0]) % 2
        for position in (first, 1 - first):
            begin = time.perf_counter()
            versions[position].classify(images)
            taken[position].append(time.perf_counter() - begin)
    return np.array(taken[0]), np.array(taken[1])
