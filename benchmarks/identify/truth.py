"""Truth of the search: losses of the VAE, and the share of failures in planted blind spots."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from defuse.v1 import run_pb2

from benchmarks.identify import planted
from benchmarks.identify.bench import Bench
from benchmarks.stand import Array, Search
from services.generator.failures import Failures
from services.generator.validity import radius_sd

_OFF: dict[str, float] = {
    "max_radius_sd": 100,
    "min_typicality": 0,
    "min_label_probability": 0,
    "min_neighbour_agreement": 0,
    "max_round_trip_sd": 1e6,
}


def reconstructions(bench: Bench) -> dict[str, Any]:
    """Train the VAE; say what it loses, for the served classifier and for one that never met it."""
    config = bench.stand.configure(bench.model, bench.dataset, vae=bench.sizes.vae)
    training_s = bench.stand.train_vae(bench.data, config)
    search = bench.prepared("reconstructions")
    other = bench.stand.register(
        "independent", bench.data, bench.data.labels["train"], seed=7, epochs=bench.sizes.classifier_epochs
    )
    second = bench.prepared("reconstructions-independent", other)
    gaps = [1 - one.preflight.reconstruction_accuracy.value for one in (search, second)]
    return {
        "accuracy": search.preflight.accuracy.value,
        "latent_dim": bench.stand.context.codec(search.run.config).latent_dim,
        "vae_training_s": round(training_s, 1),
        "reconstruction_accuracy_gap": round(gaps[0], 4),
        "reconstruction_accuracy_gap_independent": round(gaps[1], 4),
        "reconstruction_images": search.preflight.reconstruction_accuracy.trials,
        "label_model_accuracy": round(search.preflight.label_model_accuracy, 4),
    }


def planted_share(bench: Bench) -> dict[str, Any]:
    """Search a classifier with planted blind spots; say how many failures are theirs, by each validity signal."""
    spots = planted.plant(bench.data)
    labels = spots.labels(bench.data.images["train"], bench.data.labels["train"])
    model = bench.stand.register("planted", bench.data, labels, seed=3, epochs=bench.sizes.classifier_epochs)
    few = {"max_sources": max(bench.sizes.sources * 2 // 5, 1)}
    defaults = bench.prepared("planted", model, search={"draws_per_source": 20} | few).until(sys.maxsize)
    off = bench.prepared(
        "planted-off",
        model,
        search={"strategy": "STRATEGY_UNIFORM", "draws_per_source": 10, "max_failures_per_source": 1000} | few,
        validity=_OFF,
    ).until(sys.maxsize)
    raw = off.failures()
    return {
        "planted_share": round(spots.share(defaults.failures()), 3),
        "planted_failures": defaults.counts.failures,
        "planted_share_by_signal": {"none": round(spots.share(raw), 3)} | _by_signal(spots, raw, defaults.run),
    } | _false_rejections(bench, spots, defaults)


def _signals(run: run_pb2.Run) -> dict[str, Callable[[dict[str, Array]], Array]]:
    limits = run.config.validity
    return {
        "radius": lambda f: f["radius_sd"] <= limits.max_radius_sd,
        "typicality": lambda f: f["typicality"] >= limits.min_typicality,
        "label_model": lambda f: f["label_probability"] >= limits.min_label_probability,
        "neighbours": lambda f: f["neighbour_agreement"] >= limits.min_neighbour_agreement,
        "round_trip": lambda f: f["round_trip_sd"] <= limits.max_round_trip_sd,
    }


def _by_signal(spots: planted.Spots, failures: dict[str, Array], run: run_pb2.Run) -> dict[str, float]:
    """Return the planted share among failures that pass each signal alone, and all of them."""
    passed = {name: signal(failures) for name, signal in _signals(run).items()}
    passed["together"] = np.all(list(passed.values()), axis=0)
    return {
        name: round(spots.share({key: array[mask] for key, array in failures.items()}), 3)
        for name, mask in passed.items()
    }


def _false_rejections(bench: Bench, spots: planted.Spots, search: Search) -> dict[str, Any]:
    """Return which share of real held-out images of the spots the same filters would throw away."""
    images, labels = bench.data.images["test"], bench.data.labels["test"]
    inside = spots.contain(images, labels)
    pair, checks = bench.stand.context.codec(search.run.config), bench.stand.context.checks(search.run)
    mu, _ = pair.encode_stored(images[inside])
    real = Failures.of(source=np.zeros(len(mu)), true_label=labels[inside], latent=mu)
    again = pair.encode(pair.decode(mu))[0]
    sd_agg = bench.stand.context.prepared(search.run).sd_agg
    kept = radius_sd(again, mu, sd_agg) <= checks.max_round_trip_sd
    rejected = {"round_trip": float((~kept).mean())}
    for check in checks.latent:
        passed = np.asarray(check.passes(check.measure(real)))
        rejected[check.field] = round(float((~passed).mean()), 3)
        kept &= passed
    return {
        "false_rejections": round(float((~kept).mean()), 3),
        "false_rejections_by_signal": rejected,
        "false_rejections_images": int(inside.sum()),
    }
