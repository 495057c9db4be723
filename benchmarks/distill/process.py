"""One of the processes that share a fit: `torchrun -m benchmarks.distill.process POINTS` prints seconds of a pass."""

import statistics
import sys
import time
import warnings

import numpy as np
import torch.distributed as dist

from benchmarks.distill.clouds import spread
from services.distiller.mixture import DirichletProcessMixture

_ITERATIONS = 6


def main() -> None:
    """Fit this rank's part with one thread."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = spread(points=int(sys.argv[1]), dim=15, seed=3)
    part = x[rank * len(x) // ranks : (rank + 1) * len(x) // ranks]
    times: list[float] = []
    model = DirichletProcessMixture(
        n_components=100,
        threads=1,
        moves=False,
        blocks=1,
        tol=0,
        max_iter=_ITERATIONS,
        init_params="random_from_data",
        group=dist.group.WORLD,
    )
    warnings.simplefilter("ignore")
    model.fit(part, check=lambda _: times.append(time.perf_counter()))
    if rank == 0:
        print(statistics.median(np.diff(times).tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
