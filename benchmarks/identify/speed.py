"""How fast: decode alone, classify alone, both together, the whole search, and the released recipe."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.identify.bench import UNIFORM_DRAWS, Bench
from benchmarks.identify.peer import better_threads
from benchmarks.stand import Search
from services.arrays import as_floats
from services.generator import pipeline
from services.storage.keys import SEARCHED_SPLIT


def throughput(bench: Bench) -> dict[str, Any]:
    """Decode alone, classify alone, both in the bare pipeline, and the whole search, each against its limit."""
    search = bench.prepared("throughput", search={"draws_per_source": UNIFORM_DRAWS})
    rates = _rates(bench, search)
    in_turn = bench.stand.context.device.type == "cpu"  # shared cores add up, on a GPU the slowest counts
    limit = 1 / (1 / rates["decode"] + 1 / rates["classify"]) if in_turn else min(rates["decode"], rates["classify"])
    searches = [_whole(bench, number) for number in range(bench.sizes.whole_repeats)]
    fractions = [_least_s(whole, rates, in_turn=in_turn) / whole.seconds for whole in searches]
    threads, pace = better_threads(bench, searches[0])
    return {
        "decode_only_per_s": round(rates["decode"]),
        "classify_only_per_s": round(rates["classify"]),
        "encode_only_per_s": round(rates["encode"]),
        "decodes_per_s": round(rates["bare"]),
        "limit_per_s": round(limit),
        "fraction_of_limit": round(rates["bare"] / limit, 3),
        "full_decodes_per_s": round(statistics.median(whole.counts.decodes / whole.seconds for whole in searches)),
        "fraction_of_limit_full": round(statistics.median(fractions), 3),
        "fractions_of_limit_full": [round(fraction, 3) for fraction in fractions],
        "released_recipe_per_s": round(pace.decodes_per_s),
        "released_recipe_threads": threads,
        "speedup_vs_released": round(rates["bare"] / pace.decodes_per_s, 2),
    }


def _whole(bench: Bench, number: int) -> Search:
    """Search with everything on, to the end."""
    return bench.prepared(f"whole-{number}", search={"draws_per_source": UNIFORM_DRAWS}).until(sys.maxsize)


def _least_s(search: Search, rates: dict[str, float], *, in_turn: bool) -> float:
    """Return the seconds that all decodes, encodes and classifications of a search take by themselves."""
    counts = search.counts
    least_s = [
        (counts.decodes + counts.decodes_again) / rates["decode"],
        counts.encodes / rates["encode"],
        counts.classifications / rates["classify"],
    ]
    return sum(least_s) if in_turn else max(least_s)


def _rates(bench: Bench, search: Search) -> dict[str, float]:
    """Return images a second of each kind of work by itself, and of the bare pipeline."""
    config, batches = search.run.config, bench.sizes.batches
    pair, submit = bench.stand.context.codec(config), bench.stand.context.classifier(search.run).submit
    decoders, size = bench.stand.context.decoders, config.search.batch_size
    images = as_floats(bench.data.images[SEARCHED_SPLIT][:size])
    z = np.random.default_rng(0).standard_normal((size, pair.latent_dim)).astype(np.float32)
    decoded = pair.decode(z)

    def classify() -> None:
        for answer in [submit(decoded) for _ in range(batches)]:
            answer.result()

    def bare() -> None:
        for _ in pipeline.classified(batches * [z], pair.decode, submit, decoders):
            pass

    def side_by_side(action: Callable[[], Any]) -> None:
        for done in [decoders.submit(action) for _ in range(batches)]:
            done.result()

    work = {
        "decode": lambda: side_by_side(lambda: pair.decode(z)),
        "classify": classify,
        "encode": lambda: side_by_side(lambda: pair.encode(images)),
        "bare": bare,
    }
    rates = _interleaved(work, images=size * batches, repeats=bench.sizes.repeats)
    return rates | {"encode": rates["encode"] * len(images) / size}


def _interleaved(work: dict[str, Callable[[], None]], *, images: int, repeats: int) -> dict[str, float]:
    """Return the median rate of each kind of work, measured in turns, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, action in work.items():
            begin = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: images / statistics.median(values) for name, values in seconds.items()}
