"""How fast: an iteration, and the way to scikit-learn's bound, from the same start."""

import contextlib
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.distill.clouds import Array, planted, reference, reference_threads, spread, start
from benchmarks.distill.sizes import Sizes
from services.distiller.mixture import DirichletProcessMixture


class _Reached(Exception):
    """The bound that was to be reached, is."""


def against_scikit_learn(sizes: Sizes, device: str) -> dict[str, Any]:
    """Time both on every shape; scikit-learn in the better of one and all threads, for so long as `sizes` say."""
    found: dict[str, list[Any]] = {}
    for points, dim in sizes.shapes:
        for name, value in _on(spread(points=points, dim=dim, seed=1), sizes, device).items():
            found.setdefault(name, []).append(value)
    return found


def _on(x: Array, sizes: Sizes, device: str) -> dict[str, Any]:
    shares = start(x, sizes.components)
    threads, theirs = reference_threads(x, shares)
    ours = _iteration_s(x, shares, sizes, device)
    bounds, theirs_s = _climb(x, shares, threads, sizes.reference_s)
    ours_s = _seconds_to(x, shares, bounds[-1], device)
    return {
        "shape": list(x.shape),
        "iteration_s": round(ours, 4),
        "reference_iteration_s": round(theirs, 4),
        "reference_threads": threads or "default",
        "speedup_per_iteration": round(theirs / ours, 1),
        "reference_iterations": len(bounds),
        "reference_to_bound_s": round(theirs_s, 2),
        "to_bound_s": round(ours_s, 2) if ours_s else None,
        "speedup_to_same_bound": round(theirs_s / ours_s, 1) if ours_s else None,
    }


def _iteration_s(x: Array, shares: Array, sizes: Sizes, device: str) -> float:
    """Return the median seconds of a plain pass: no moves, one block, all components alive."""
    times = [time.perf_counter()]
    model = DirichletProcessMixture(
        n_components=shares.shape[1], moves=False, blocks=1, max_iter=sizes.repeats + 1, tol=0, device=device
    )
    with _unconverged():
        model.fit(x, responsibilities=shares, check=lambda _: times.append(time.perf_counter()))
    return statistics.median(np.diff(times[1:]).tolist())


def _climb(x: Array, shares: Array, threads: int | None, seconds: float) -> tuple[list[float], float]:
    """Let scikit-learn iterate until its bound moves by less than 1e-3, or the time is over."""
    bounds: list[float] = []
    with threadpool_limits(threads):
        begin = time.perf_counter()
        for bound in reference(x, shares):
            bounds.append(bound)
            if (len(bounds) > 1 and abs(bounds[-1] - bounds[-2]) < 1e-3) or time.perf_counter() - begin > seconds:
                break
    return bounds, time.perf_counter() - begin


def _seconds_to(x: Array, shares: Array, bound: float, device: str) -> float | None:
    """Return the seconds of a fit at its defaults from the same start to a bound; None if it ends below."""
    begin = time.perf_counter()

    def check(reached: float) -> None:
        if reached >= bound:
            raise _Reached

    with contextlib.suppress(_Reached), _unconverged():
        DirichletProcessMixture(n_components=shares.shape[1], device=device).fit(
            x, responsibilities=shares, check=check
        )
        return None
    return time.perf_counter() - begin


def bound_gap(sizes: Sizes) -> dict[str, Any]:
    """Run both from their own k-means to a tolerance of 1e-6 or 500 iterations; ours minus theirs, relative."""
    gaps = []
    for seed in range(sizes.seeds):
        x, _, _ = planted(components=12, dim=5, points=sizes.gap_points, apart=2.0, seed=seed)
        settings: dict[str, Any] = {"n_components": 30, "tol": 1e-6, "max_iter": sizes.gap_iterations}
        with _unconverged():
            theirs = BayesianGaussianMixture(**settings, random_state=seed).fit(x).lower_bound_
            ours = DirichletProcessMixture(**settings, random_state=seed).fit(x).lower_bound_
        gaps.append((ours - theirs) / abs(theirs))
    return {"bound_gap": float(f"{min(gaps):.3g}"), "bound_gaps": [float(f"{gap:.3g}") for gap in gaps]}


def scaling(sizes: Sizes, device: str) -> dict[str, Any]:
    """Time a pass over ever more points of 15 dimensions."""
    seconds = []
    for points in sizes.scaling:
        x = spread(points=points, dim=15, seed=2)
        shares_of = start(x[: min(points, 50_000)], sizes.components)
        times = [time.perf_counter()]
        model = DirichletProcessMixture(
            n_components=shares_of.shape[1],
            moves=False,
            blocks=1,
            max_iter=sizes.repeats + 1,
            tol=0,
            device=device,
            init_params="k-means++",
        )
        with _unconverged():
            model.fit(x, check=lambda _, times=times: times.append(time.perf_counter()))
        seconds.append(statistics.median(np.diff(times[1:]).tolist()))
    return {
        "seconds_per_iteration": [round(value, 4) for value in seconds],
        "seconds_per_iteration_points": list(sizes.scaling),
        "million_over_hundred_thousand": round(seconds[-1] / seconds[-2], 2),
    }


def two_processes(sizes: Sizes) -> dict[str, Any]:
    """Time passes in one process and in two, a thread each, in turns."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(sizes.process_repeats):
        for processes, values in seconds.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command += ["-m", "benchmarks.distill.process", str(sizes.process_points)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            values.append(float(done.stdout.split()[-1]))
    one, two = (statistics.median(values) for values in seconds.values())
    return {"two_process_speedup": round(one / two, 2), "process_iteration_s": [round(one, 3), round(two, 3)]}


@contextlib.contextmanager
def _unconverged() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
