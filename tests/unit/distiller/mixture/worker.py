"""Fits a part of some points, as one of several processes that torchrun starts; the first writes what was found."""

import os
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from services.distiller.mixture import DirichletProcessMixture
from tests.unit.distiller.mixture.clouds import planted


def main() -> None:
    """Take every rank's consecutive part of the points."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, label = planted(clouds=6, dim=4, points=1501, apart=4.0)
    begin, end = rank * len(x) // ranks, (rank + 1) * len(x) // ranks
    model = DirichletProcessMixture(n_components=25, threads=1, blocks=1, group=dist.group.WORLD)
    model.fit(x[begin:end], categories=[label[begin:end] % 2])
    if rank == 0:
        np.savez(Path(sys.argv[1]), bound=model.lower_bound_, means=model.means_, counts=model.counts_)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
