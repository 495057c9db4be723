"""The released recipe on the sources and filters of one of our searches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from benchmarks.identify import released
from benchmarks.identify.bench import CAP, Bench
from benchmarks.stand import Array, Search
from services.generator.rounds import read_margins
from services.storage.keys import SEARCHED_SPLIT


def run_released(
    bench: Bench, search: Search, *, failures: int, seconds: float, threads: int, bare: bool = False
) -> released.Pace:
    """Run the released recipe on the sources of a search, with its filters or bare."""
    stand = bench.stand
    checks = stand.context.checks(search.run)
    with _torch_threads(threads):
        return released.search(
            stand.context.codec(search.run.config),
            stand.context.classifier(search.run),
            _sources(bench, search),
            stand.context.prepared(search.run).sd_agg,
            replace(checks, latent=[]) if bare else checks,
            radius_sd_=search.run.config.search.radius_sd,
            limit=CAP,
            failures=failures,
            seconds=seconds,
        )


def better_threads(bench: Bench, search: Search) -> tuple[int, released.Pace]:
    """Return with how many threads the released recipe is faster, one or all, and how fast."""
    seconds = min(bench.sizes.released_s, 10)
    paces = {
        threads: run_released(bench, search, failures=sys.maxsize, seconds=seconds, threads=threads, bare=True)
        for threads in {1, torch.get_num_threads()}
    }
    best = max(paces, key=lambda threads: paces[threads].decodes_per_s)
    return best, paces[best]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sources(bench: Bench, search: Search) -> tuple[Array, Array]:
    """Return the posterior means and labels of the sources that a search may search around."""
    index = np.array(bench.stand.context.prepared(search.run).index)
    labels = bench.stand.context.images(search.run, SEARCHED_SPLIT).labels[index]
    parts = [read_margins(bench.stand.store, search.run.name, shard) for shard in range(search.shards)]
    searchable = np.concatenate([examined.searchable for examined, _ in parts])
    mu = np.concatenate([mu for _, mu in parts])
    return mu[searchable], labels[searchable]
