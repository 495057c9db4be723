"""Anonymous memory of a fit: `python -m benchmarks.distill.memory POINTS FOLDER [--streamed]`, in a fresh process."""

import argparse
import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.distill.clouds import spread
from services.distiller.mixture import DirichletProcessMixture
from services.storage.artifacts import ArtifactStore

_DIM, _COMPONENTS, _ITERATIONS = 15, 100, 2
_PART = 100_000


def main() -> None:
    """Warm up on few points, fit many, print peak over data."""
    arguments = _arguments()
    _fit(spread(points=2000, dim=_DIM, seed=0))
    store = ArtifactStore(f"file://{arguments.folder}")
    before = _anonymous_mib()
    if arguments.streamed:
        store.write_arrays("points", {"x": _on_disk(arguments.points, arguments.folder)})
        x: Any = store.map_arrays("points")["x"]
    else:
        x = spread(points=arguments.points, dim=_DIM, seed=0)
    peak = _peak_mib(x)
    data = arguments.points * _DIM * x.dtype.itemsize / 2**20
    print(
        json.dumps({"peak_mib": round(peak - before, 1), "data_mib": round(data, 1), "ratio": (peak - before) / data})
    )


def _on_disk(points: int, folder: Path) -> Any:
    """Write points in parts, to a file that is mapped."""
    x = np.lib.format.open_memmap(folder / "points.npy", mode="w+", dtype=np.float32, shape=(points, _DIM))
    for number, begin in enumerate(range(0, points, _PART)):
        part = x[begin : begin + _PART]
        part[:] = spread(points=len(part), dim=_DIM, seed=number % 7)
    return x


def _fit(x: Any) -> None:
    warnings.simplefilter("ignore")
    DirichletProcessMixture(
        n_components=_COMPONENTS, moves=False, max_iter=_ITERATIONS, tol=0, init_params="k-means++"
    ).fit(x)


def _peak_mib(x: Any) -> float:
    """Fit in a thread of its own; return the most anonymous memory meanwhile."""
    fitting, peak = threading.Thread(target=_fit, args=(x,)), 0.0
    fitting.start()
    while fitting.is_alive():
        peak = max(peak, _anonymous_mib())
        time.sleep(0.02)
    return peak


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streamed", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
