"""Estimates, models and data sets from messages."""

from datetime import UTC, datetime

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import (
    dataset_pb2,
    model_pb2,
    tensor_pb2,
)
from defuse.values import (
    Dataset,
    Estimate,
    Model,
    Preprocessing,
)
from google.protobuf.timestamp_pb2 import Timestamp

TIMESTAMP = Timestamp(seconds=1_700_000_000)
WHEN = datetime.fromtimestamp(1_700_000_000, UTC)
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


def test_estimate() -> None:
    """The text has share, interval and trials, or `not measured`."""
    assert str(Estimate.from_proto(HALF)) == "0.500 [0.250, 0.750] (n=16)"
    assert str(Estimate.from_proto(tensor_pb2.Estimate(high=1.0))) == "not measured"


def test_preprocessing_round_trip() -> None:
    """The declaration comes back unchanged."""
    declared = Preprocessing(layout="NHWC", low=-1.0, high=1.0, mean=(0.5,), std=(0.25,))
    assert Preprocessing.from_proto(declared.to_proto()) == declared
    assert declared.to_proto().layout == model_pb2.Preprocessing.LAYOUT_NHWC


@pytest.mark.parametrize("layout", ["", "nchw", "CHWN", "UNSPECIFIED"])
def test_unknown_layout(layout: str) -> None:
    """The error names an unknown layout."""
    with pytest.raises(InvalidInput, match=f"layout {layout!r}"):
        Preprocessing(layout=layout).to_proto()


def test_model() -> None:
    """A model has a plain id, plain words and a UTC time."""
    message = model_pb2.Model(
        name="models/tiny",
        classes=["ant", "bee"],
        preprocessing=Preprocessing().to_proto(),
        output="OUTPUT_LOGITS",
        image_shape=[8, 10, 3],
        champion_version=2,
        create_time=TIMESTAMP,
    )
    assert Model.from_proto(message) == Model(
        id="tiny",
        classes=("ant", "bee"),
        preprocessing=Preprocessing(),
        output="logits",
        image_shape=(8, 10, 3),
        champion_version=2,
        create_time=WHEN,
    )


def test_dataset() -> None:
    """A data set has the size of each split."""
    splits = [dataset_pb2.Split(name="train", size=30), dataset_pb2.Split(name="val", size=10)]
    message = dataset_pb2.Dataset(
        name="datasets/d1", display_name="pets", image_shape=[8, 8, 1], classes=["a"], splits=splits
    )
    assert Dataset.from_proto(message) == Dataset(
        id="d1", display_name="pets", image_shape=(8, 8, 1), classes=("a",), sizes={"train": 30, "val": 10}
    )
