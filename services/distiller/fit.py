"""`python -m services.distiller.fit`: fits one large mixture to stored arrays.

  torchrun --nproc-per-node 2 -m services.distiller.fit STORE KEY OUT [--array latent] [--category true_label ...]

Each process of torchrun reads a part of the rows, a chunk at a time. The result equals
that of one process to 1e-9. The first process writes it to OUT: weights (K,), means
(K, d), covariances, counts (K,), lower_bound and converged, with the largest weight
first.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from defuse.errors import DefuseError, InvalidInput

from services.arrays import Array
from services.distiller.mixture import DirichletProcessMixture
from services.storage.artifacts import ArtifactStore


def main() -> None:
    """Fit the mixture and write the result.

    Exits with status 1 and a one-line error message when the input is invalid or missing.
    """
    try:
        _fit(_arguments())
    except (DefuseError, ValueError) as error:
        sys.exit(f"fit: {error}")


def _fit(arguments: argparse.Namespace) -> None:
    store = ArtifactStore(arguments.store)
    with _together(arguments.device) as (rank, ranks, device, group):
        arrays = _rows(store.map_arrays(arguments.key), arguments, rank, ranks)
        model = DirichletProcessMixture(
            n_components=arguments.components,
            covariance_type=arguments.covariance,
            tol=arguments.tolerance,
            max_iter=arguments.iterations,
            learn_prior=arguments.learn_prior,
            blocks=arguments.blocks,
            random_state=arguments.seed,
            device=device,
            group=group,
        )
        model.fit(arrays[arguments.array], categories=[arrays[name] for name in arguments.category])
        if rank == 0:
            store.write_arrays(arguments.out, _found(model))
            components = int((model.counts_ > 1).sum())
            sys.stdout.write(f"{components} components of more than a point, {model.n_iter_} passes\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.distiller.fit", description=__doc__)
    parser.add_argument("store", help="URL of the artifact store, for instance file:///data/store")
    parser.add_argument("key", help="arrays to fit")
    parser.add_argument("out", help="where the mixture is written")
    parser.add_argument("--array", default="latent", help="the points among the arrays, (n, d)")
    parser.add_argument("--category", action="append", default=[], help="class ids beside them, (n,); may be repeated")
    parser.add_argument("--components", type=int, default=100, help="truncation")
    parser.add_argument("--covariance", default="full", choices=("full", "tied", "diag", "spherical"))
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument(
        "--blocks",
        type=int,
        default=1,
        help="updates in one pass over the data: more take fewer passes, but then a result depends on the processes",
    )
    parser.add_argument("--learn-prior", action="store_true", help="learn the expected shape of a component")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


@contextmanager
def _together(device: str) -> Iterator[tuple[int, int, str, Any]]:
    """Yield rank, number of processes, device and process group.

    Outside torchrun there is one process, and no group.
    """
    if "RANK" not in os.environ:
        yield 0, 1, device, None
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _rows(arrays: dict[str, Array], arguments: argparse.Namespace, rank: int, ranks: int) -> dict[str, Array]:
    """Return this process's rows of the fitted arrays."""
    wanted = [arguments.array, *arguments.category]
    if missing := [name for name in wanted if name not in arrays]:
        raise InvalidInput(f"{arguments.key} has no array {missing[0]!r}; it has: {', '.join(sorted(arrays))}")
    count = len(arrays[arguments.array])
    part = slice(rank * count // ranks, (rank + 1) * count // ranks)
    return {name: arrays[name][part] for name in wanted}


def _found(model: DirichletProcessMixture) -> dict[str, Array]:
    order = np.argsort(-model.weights_, kind="stable")
    covariances = model.covariances_ if model.covariance_type == "tied" else model.covariances_[order]
    return {
        "weights": model.weights_[order],
        "means": model.means_[order],
        "covariances": covariances,
        "counts": model.counts_[order],
        "lower_bound": np.array(model.lower_bound_),
        "converged": np.array(int(model.converged_)),
    }


if __name__ == "__main__":
    main()
