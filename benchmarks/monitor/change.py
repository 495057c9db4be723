"""Change in traffic: how long until a false alarm, how soon a true one, and how well accuracy is told without truth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from defuse.v1 import monitor_pb2

from benchmarks.guarded import Guarded
from benchmarks.stand import Array, Data, Stand
from services.distiller.observation_scoring import GuardModel, reference_profile, top_predictions
from services.gateway.monitoring.monitor_state import ReferenceProfile, ScoredBatch, restart, update_state
from services.storage.catalog import LabelledImages
from services.triton.client import Classifier

# Shares of the traffic that move into a known region.
_SHARES = (0.05, 0.2, 0.5)
# Observations of calm before they do, and of the longest stream behind it.
_BEFORE, _LONGEST = 1_000, 20_000
_BATCH = 256
_RUN_LENGTH = 100_000.0
# Calm streams are simulated with a shorter one: so many times as long as that, at most.
_SIMULATED_RUN_LENGTH, _TIMES = 500.0, 10


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Images of the traffic, with the scores and the correctness of each."""

    arrays: Mapping[str, Array]
    correct: Array

    def draw(self, rows: Array) -> ScoredBatch:
        return ScoredBatch(
            arrays={name: array[rows] for name, array in self.arrays.items()}, versions=["1"] * len(rows)
        )


def figures(stand: Stand, whole: Data, world: Guarded, *, streams: int, shifted: int) -> dict[str, Any]:
    """Return the figures of `streams` unchanged streams, and of `shifted` streams for each share that moves.

    The reference profile comes from one half of the clean test images, traffic from the other half; real images of a
    planted spot move into a region.
    """
    guard_model = GuardModel(stand.store, world.guard.name, world.model)
    classifier = stand.inference.classifier(world.model, version=1)
    spots = world.spots.inside(whole.images["test"], whole.labels["test"])
    clean = np.flatnonzero(~np.any(spots, axis=0))
    reference, drawn = clean[::2], clean[1::2]
    looks = reference_profile(guard_model, classifier, _images(whole, reference))
    known = ReferenceProfile(guard=world.guard, classes=world.model.classes, arrays=looks)
    usual, moved = (_pool(guard_model, classifier, _images(whole, rows)) for rows in (drawn, np.flatnonzero(spots[0])))
    return {
        "mean_run_length": _mean_run_length(known, usual, streams),
        "detection_delay": {str(share): _delay(known, usual, moved, share, shifted) for share in _SHARES},
        "estimated_accuracy_error": _accuracy_error(known, usual, moved),
    }


def _images(whole: Data, rows: Array) -> LabelledImages:
    return LabelledImages(images=whole.images["test"][rows], labels=whole.labels["test"][rows])


def _pool(guard_model: GuardModel, classifier: Classifier, data: LabelledImages) -> _Pool:
    read = top_predictions(classifier.classify_stored(data.images))
    return _Pool(arrays={**guard_model.look(data.images), **read}, correct=read["predicted"] == data.labels)


def _mean_run_length(known: ReferenceProfile, usual: _Pool, streams: int) -> dict[str, float]:
    """Return the mean time to a false alert over the stated one; a stream without one counts with its length."""
    longest = int(_SIMULATED_RUN_LENGTH * _TIMES)
    generator = np.random.default_rng(0)

    def time_to_alert() -> int:
        rows = generator.integers(len(usual.correct), size=longest)
        return _until_alert(known, (usual.draw(part) for part in _parts(rows)), _SIMULATED_RUN_LENGTH) or longest

    times = np.array([time_to_alert() for _ in range(streams)])
    return {
        "stated": _SIMULATED_RUN_LENGTH,
        "over_stated": round(float(times.mean()) / _SIMULATED_RUN_LENGTH, 2),
        "streams": streams,
        "without_alert": round(float((times == longest).mean()), 3),
    }


def _delay(known: ReferenceProfile, usual: _Pool, moved: _Pool, share: float, streams: int) -> dict[str, float]:
    """Return how many requests pass until the alert, when a share of them moves after a calm time."""
    generator = np.random.default_rng(round(1000 * share))

    def delay() -> int:
        unchanged_rows = generator.integers(len(usual.correct), size=_BEFORE)
        batches = [usual.draw(part) for part in _parts(unchanged_rows)]
        while sum(len(batch.versions) for batch in batches) < _BEFORE + _LONGEST:
            batches.append(_mixed(usual, moved, share, generator))
        found = _until_alert(known, iter(batches), _RUN_LENGTH)
        return found - _BEFORE if found else _LONGEST

    delays = np.array([delay() for _ in range(streams)])
    return {"median": float(np.median(delays)), "p90": float(np.quantile(delays, 0.9))}


def _mixed(usual: _Pool, moved: _Pool, share: float, generator: np.random.Generator) -> ScoredBatch:
    """Return a batch of which a share, drawn for each observation, comes from the other images."""
    of_moved = generator.random(_BATCH) < share
    drawn = [pool.draw(generator.integers(len(pool.correct), size=_BATCH)).arrays for pool in (usual, moved)]
    arrays = {
        name: np.where(of_moved.reshape(-1, *[1] * (array.ndim - 1)), drawn[1][name], array)
        for name, array in drawn[0].items()
    }
    return ScoredBatch(arrays=arrays, versions=["1"] * _BATCH)


def _accuracy_error(known: ReferenceProfile, usual: _Pool, moved: _Pool) -> dict[str, float]:
    """Return the estimated accuracy less the real one, for traffic of which shares come from the spot."""
    errors = {}
    for share in (0.0, *_SHARES):
        generator = np.random.default_rng(7)
        rows = generator.integers(len(usual.correct), size=round(_LONGEST * (1 - share)))
        others = generator.integers(len(moved.correct), size=round(_LONGEST * share))
        state = monitor_pb2.MonitorState()
        restart(state, known)
        for pool, which in ((usual, rows), (moved, others)):
            for part in _parts(which):
                update_state(state, pool.draw(part), known, expected_run_length=np.inf)
        real = (usual.correct[rows].sum() + moved.correct[others].sum()) / (len(rows) + len(others))
        errors[str(share)] = round(state.monitor.estimated_accuracy - float(real), 4)
    return errors


def _until_alert(known: ReferenceProfile, batches: Iterator[ScoredBatch], run_length: float) -> int:
    """Return after how many observations the first alert comes; 0 where none does."""
    state = monitor_pb2.MonitorState()
    restart(state, known)
    for batch in batches:
        if alerts := update_state(state, batch, known, expected_run_length=run_length):
            return int(alerts[0].observations)
    return 0


def _parts(rows: Array) -> Iterator[Array]:
    for begin in range(0, len(rows), _BATCH):
        yield rows[begin : begin + _BATCH]
