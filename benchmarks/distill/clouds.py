"""Mixtures whose parameters are known, and what scikit-learn makes of the same start."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import multivariate_normal
from sklearn.cluster import MiniBatchKMeans
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Array = npt.NDArray[Any]


def planted(
    *, components: int, dim: int, points: int, apart: float, seed: int, least: int = 50
) -> tuple[Array, Array, Array]:
    """Plant components of very unequal weight; return points (n, d), labels, and the labels that the truth gives."""
    random = np.random.default_rng(seed)
    counts = np.maximum((random.dirichlet(np.full(components, 0.5)) * points).astype(int), least)
    means = random.normal(0, apart, (components, dim))
    covariances = [_covariance(dim, random) for _ in range(components)]
    x = np.concatenate(
        [random.multivariate_normal(m, c, n) for m, c, n in zip(means, covariances, counts, strict=True)]
    )
    log_joint = np.stack(
        [
            np.log(count) + multivariate_normal(mean, covariance).logpdf(x)
            for mean, covariance, count in zip(means, covariances, counts, strict=True)
        ],
        axis=1,
    )
    return x, np.repeat(np.arange(components), counts), log_joint.argmax(axis=1)


def spread(*, points: int, dim: int, seed: int, components: int = 60) -> Array:
    """Draw many points (n, d) of clouds that overlap, in parts, so that memory stays that of the result."""
    random = np.random.default_rng(seed)
    x = np.empty((points, dim))
    means = random.normal(0, 2.0, (components, dim))
    roots = random.normal(0, 0.5 / np.sqrt(dim), (components, dim, dim)) + np.eye(dim)
    for begin in range(0, points, 10_000):
        part = x[begin : begin + 10_000]
        share = random.integers(components, size=len(part))
        for number in np.unique(share):
            rows = share == number
            part[rows] = means[number] + random.standard_normal((int(rows.sum()), dim)) @ roots[number]
    return x


def start(x: Array, components: int, seed: int = 0) -> Array:
    """Return responsibilities (n, K), hard ones of a k-means on a few points."""
    labels = MiniBatchKMeans(components, n_init=1, random_state=seed, max_iter=20).fit(x[:20_000]).predict(x)
    shares = np.zeros((len(x), components))
    shares[np.arange(len(x)), labels] = 1.0
    return shares


def reference(x: Array, shares: Array) -> Iterator[float]:
    """Iterate scikit-learn's mixture from given responsibilities; yield the bound after each iteration.

    It offers no public way to begin from responsibilities, nor to look at an iteration.
    """
    model = BayesianGaussianMixture(n_components=shares.shape[1])
    model._check_parameters(x, xp=np)  # noqa: SLF001
    model._initialize(x, shares)  # noqa: SLF001
    while True:
        log_norm, log_resp = model._e_step(x)  # noqa: SLF001
        model._m_step(x, log_resp)  # noqa: SLF001
        yield float(model._compute_lower_bound(log_resp, log_norm))  # noqa: SLF001


def reference_threads(x: Array, shares: Array) -> tuple[int | None, float]:
    """Return with how many threads an iteration of scikit-learn takes least, None for its default, and the seconds."""
    timed = {threads: _second_iteration(x, shares, threads) for threads in (1, None)}
    best = min(timed, key=lambda threads: timed[threads])
    return best, timed[best]


def _second_iteration(x: Array, shares: Array, threads: int | None) -> float:
    with threadpool_limits(threads):
        iterations = reference(x, shares)
        next(iterations)
        begin = time.perf_counter()
        next(iterations)
        return time.perf_counter() - begin


def _covariance(dim: int, random: np.random.Generator) -> Array:
    axes, _ = np.linalg.qr(random.normal(size=(dim, dim)))
    return np.asarray((axes * random.uniform(0.3, 1.5, dim) ** 2) @ axes.T)
