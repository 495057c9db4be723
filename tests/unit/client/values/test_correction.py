"""Corrections and releases from messages."""

from datetime import UTC, datetime

import pytest
from defuse.v1 import (
    correction_pb2,
    release_pb2,
    tensor_pb2,
)
from defuse.values import (
    Choice,
    Correction,
    PairedDifference,
    Release,
)
from google.protobuf.timestamp_pb2 import Timestamp

TIMESTAMP = Timestamp(seconds=1_700_000_000)
WHEN = datetime.fromtimestamp(1_700_000_000, UTC)
CHANGE = correction_pb2.PairedDifference(value=-0.01, low=-0.03, high=0.01, gained=1, lost=2, trials=100, p_value=0.5)
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)
WHO = {"actor": "anna", "reason": "bold sevens", "approver": "otto"}


def succeeded() -> correction_pb2.Correction:
    """Return a succeeded correction with three points."""
    change = correction_pb2.RegionChange(
        region="runs/first/regions/r1",
        label="ant",
        before=HALF,
        after=HALF,
        exemplars_before=["bee"],
        exemplars_after=["ant"],
    )
    result = correction_pb2.CorrectionResult(
        regions=[change],
        test_before=HALF,
        parity=[{"batch_size": 2, "max_abs_difference": 1e-6}],
        candidate="tiny-candidate",
        candidate_version=3,
        choice={
            "rule": "the best",
            "method": "METHOD_INTERPOLATION",
            "region_weight": 0.5,
            "learning_rate": 0.1,
            "share": 1,
            "non_inferior": True,
        },
    )
    return correction_pb2.Correction(
        name="runs/first/corrections/c1",
        model="models/tiny",
        base_version=1,
        state="STATE_SUCCEEDED",
        config={"region_weights": [0.3, 0.5], "methods": ["METHOD_ALL_WEIGHTS"], "augmentation": {"max_shift": 0.1}},
        trainings=[
            {"method": "METHOD_ALL_WEIGHTS", "region_weight": 0.3, "points": [{"share": 1, "test": HALF}]},
            {
                "method": "METHOD_INTERPOLATION",
                "region_weight": 0.5,
                "learning_rate": 0.1,
                "points": [{"share": 0.4}, {"share": 1, "test_change": CHANGE}],
            },
            {"method": "METHOD_LAST_LAYER"},
        ],
        result=result,
    )


def test_correction() -> None:
    """A correction has plain ids and every figure of its result."""
    found = Correction.from_proto(succeeded())
    assert (found.id, found.run, found.model, found.base_version) == ("c1", "first", "tiny", 1)
    assert (found.config["region_weights"], found.config["methods"]) == ([0.3, 0.5], ["all_weights"])
    assert found.config["augmentation"]["max_shift"] == 0.1
    assert [(point.method, point.region_weight, point.share, point.chosen) for point in found.points] == [
        ("all_weights", 0.3, 1.0, False),
        ("interpolation", 0.5, 0.4, False),
        ("all_weights", 0.5, 1.0, True),
    ]
    assert found.points[2].test_change == PairedDifference(
        value=-0.01, low=-0.03, high=0.01, gained=1, lost=2, trials=100, p_value=0.5
    )
    assert found.choice == Choice(
        rule="the best", method="all_weights", region_weight=0.5, learning_rate=0.1, share=1.0, non_inferior=True
    )
    assert (found.state, found.ended, found.candidate, found.candidate_version) == (
        "succeeded",
        True,
        "tiny-candidate",
        3,
    )
    assert (found.test_before.trials, found.test_after.trials, found.parity) == (16, 0, {2: 1e-6})
    [one] = found.regions
    assert (one.region, one.label, one.after.value) == ("r1", "ant", 0.5)
    assert (one.exemplars_before, one.exemplars_after) == (("bee",), ("ant",))


def test_unfinished_correction() -> None:
    """It has finished points, but no choice."""
    message = correction_pb2.Correction(
        name="runs/first/corrections/c1",
        model="models/tiny",
        state="STATE_RUNNING",
        trainings=[{"method": "METHOD_CONTINUED", "points": [{"share": 1}]}],
    )
    found = Correction.from_proto(message)
    assert (found.choice, found.ended) == (None, False)
    assert [(point.method, point.chosen) for point in found.points] == [("continued", False)]


@pytest.mark.parametrize("kind", ["REGISTERED", "RELEASED", "ROLLED_BACK"])
def test_release(kind: str) -> None:
    """The kind of a release is a word."""
    message = release_pb2.Release(
        model="models/tiny",
        kind=f"KIND_{kind}",
        version=2,
        previous_version=1,
        correction="c",
        verdict="models/tiny/verdicts/v",
        create_time=TIMESTAMP,
        **WHO,
    )
    assert Release.from_proto(message) == Release(
        model="tiny",
        kind=kind.lower(),
        version=2,
        previous_version=1,
        correction="c",
        verdict="v",
        create_time=WHEN,
        **WHO,
    )
