"""The monitor's state over planted traffic."""

from typing import Any

import numpy as np
from defuse.v1 import correction_pb2, guard_pb2, monitor_pb2

from services.gateway.monitoring.monitor_state import ReferenceProfile, ScoredBatch, restart, update_state

REGIONS = ("runs/a/regions/r1", "runs/a/regions/r2")
CLASSES = ("ant", "bee")
RUN_LENGTH = 10_000.0
Kind = monitor_pb2.Alert


def profile() -> ReferenceProfile:
    """Two per cent and one per cent of a thousand images in the regions, both classes as often as the other."""
    guard = guard_pb2.Guard(
        name="models/m/guards/1",
        regions=[
            correction_pb2.LabelledRegion(region=name, label=label)
            for name, label in zip(REGIONS, CLASSES, strict=True)
        ],
    )
    arrays = {
        "images": np.array([1000]),
        "hits": np.array([20, 10]),
        "hits_low": np.array([0.012, 0.005]),
        "hits_high": np.array([0.031, 0.018]),
        "hits_bound": np.array([0.035, 0.021]),
        "predicted": np.array([500, 500]),
        "predicted_bound": np.array([0.55, 0.55]),
        "typicality": np.linspace(0, 1, 1000),
        "correct": np.array([900]),
        "error_rate": np.array([0.9, 0.5]),
        "searched_version": np.array([1]),
        "recall": np.array([0.8]),
        "confidence": np.array([0.6]),
    }
    return ReferenceProfile(guard=guard, classes=CLASSES, arrays=arrays)


def traffic(count: int, *, seed: int = 0, rates: tuple[float, float] = (0.02, 0.01), **changed: Any) -> ScoredBatch:
    """Return what is seen of images of which so many shares fall in the regions."""
    generator = np.random.default_rng(seed)
    drawn = generator.random(count)
    index = np.where(drawn < rates[0], 0, 1)
    arrays = {
        "index": index.astype(np.int64),
        "inside": (drawn < sum(rates)).astype(np.uint8),
        "typicality": generator.random(count).astype(np.float32),
        "predicted": generator.integers(2, size=count),
        "confidence": generator.uniform(0.5, 1.0, count).astype(np.float32),
        **changed,
    }
    return ScoredBatch(arrays=arrays, versions=["1"] * count)


def fresh() -> monitor_pb2.MonitorState:
    state = monitor_pb2.MonitorState()
    restart(state, profile())
    return state


def folded(state: monitor_pb2.MonitorState, seen: ScoredBatch) -> list[monitor_pb2.Alert]:
    return update_state(state, seen, profile(), expected_run_length=RUN_LENGTH)


def test_unchanged_traffic_is_counted_and_raises_nothing() -> None:
    state = fresh()
    seen = traffic(500)
    assert folded(state, seen) == []
    monitor = state.monitor
    assert monitor.observations == state.total == 500
    assert dict(monitor.versions) == {"1": 500}
    inside, index = seen.arrays["inside"] > 0, seen.arrays["index"]
    assert [hits.hits for hits in monitor.hits] == [int((inside & (index == one)).sum()) for one in (0, 1)]
    assert monitor.prediction_drift < 0.05
    assert abs(monitor.latent_drift) < 0.1
    assert 0.7 < monitor.estimated_accuracy < 0.9


def test_accuracy_without_truth() -> None:
    """Confidence knows nothing of a blind spot, but known regions do, where the version that was searched answers."""
    moved = traffic(100, rates=(0.41, 0.01))  # so 0.39 of 0.78 moved
    estimates = []
    for version in ("1", "2"):
        state = fresh()
        seen = ScoredBatch(arrays=moved.arrays, versions=[version] * 100)
        update_state(state, seen, profile(), expected_run_length=1e300)
        estimates.append(state.monitor.estimated_accuracy)
    assert abs(estimates[0] - (0.5 * 0.8 + 0.5 * 0.1)) < 0.12
    assert abs(estimates[1] - 0.8) < 0.12


def test_batches_fold_as_one() -> None:
    """Where the batches are cut has no effect on counts and evidence."""
    whole, parts, seen = fresh(), fresh(), traffic(300)
    folded(whole, seen)
    for begin, end in ((0, 100), (100, 101), (101, 300)):
        cut = {name: array[begin:end] for name, array in seen.arrays.items()}
        folded(parts, ScoredBatch(arrays=cut, versions=seen.versions[begin:end]))
    np.testing.assert_allclose(whole.region_evidence, parts.region_evidence)
    np.testing.assert_allclose(whole.rank_evidence, parts.rank_evidence)
    assert [one.hits for one in whole.monitor.hits] == [one.hits for one in parts.monitor.hits]


def test_traffic_that_moves_into_a_region() -> None:
    """The alert names the region, and the monitor begins anew; about that region it is silent for a while."""
    state = fresh()
    assert folded(state, traffic(200)) == []
    [alert] = folded(state, traffic(400, seed=1, rates=(0.02, 0.3)))
    assert (alert.kind, alert.subject) == (Kind.KIND_REGION_HITS, REGIONS[1])
    assert alert.evidence >= RUN_LENGTH
    assert 200 < alert.observations < 300
    assert alert.calm == 0.01
    assert alert.now > 0.02
    assert "region r2 of run a (bee)" in alert.summary
    assert state.monitor.observations == 0
    assert state.total == 600
    assert folded(state, traffic(400, seed=2, rates=(0.02, 0.3))) == []
    [other] = folded(state, traffic(400, seed=3, rates=(0.3, 0.3)))
    assert other.subject == REGIONS[0]


def test_silence_ends() -> None:
    """A lasting change is reported again after a tenth of the run length."""
    state = fresh()
    folded(state, traffic(200, rates=(0.02, 0.4)))
    alerts = [alert for seed in range(8) for alert in folded(state, traffic(200, seed=seed, rates=(0.02, 0.4)))]
    assert [alert.subject for alert in alerts] == [REGIONS[1]]


def test_classes_that_are_predicted_oftener() -> None:
    state = fresh()
    [alert] = folded(state, traffic(400, predicted=np.ones(400, np.int64)))
    assert (alert.kind, alert.subject) == (Kind.KIND_PREDICTION_DRIFT, "bee")


def test_images_that_are_less_usual() -> None:
    state = fresh()
    typicality = np.random.default_rng(0).beta(1, 4, 400).astype(np.float32)
    [alert] = folded(state, traffic(400, typicality=typicality))
    assert alert.kind == Kind.KIND_LATENT_DRIFT
    assert "less usual" in alert.summary


def test_observations_without_image_or_scores() -> None:
    """Unscored images are counted, without evidence."""
    state = fresh()
    nothing = {
        "index": np.full(300, -1),
        "inside": np.zeros(300, np.uint8),
        "typicality": np.full(300, np.nan, np.float32),
        "predicted": np.full(300, -1),
        "confidence": np.full(300, np.nan, np.float32),
    }
    assert folded(state, traffic(300, **nothing)) == []
    assert state.monitor.observations == 300
    assert not state.monitor.HasField("estimated_accuracy")
    assert not any(state.region_evidence)
