"""Regions, annotations and pictures from messages."""

from datetime import UTC, datetime

import numpy as np
import pytest
from defuse import tensors
from defuse.v1 import (
    annotation_pb2,
    gateway_service_pb2,
    region_pb2,
    tensor_pb2,
)
from defuse.values import (
    Annotation,
    Estimate,
    Region,
    RegionPictures,
)
from google.protobuf.timestamp_pb2 import Timestamp

TIMESTAMP = Timestamp(seconds=1_700_000_000)
WHEN = datetime.fromtimestamp(1_700_000_000, UTC)
HALF = tensor_pb2.Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


def region(**more: object) -> region_pb2.Region:
    return region_pb2.Region(
        name="runs/first/regions/r1",
        weight=0.25,
        size=40,
        held_out_size=12,
        true_label="ant",
        predicted_label="bee",
        error_rate=HALF,
        suggested_label="ant",
        suggestion_reason="near",
        **more,  # type: ignore[arg-type]
    )


def test_open_region() -> None:
    """A region without a verdict is open."""
    found = Region.from_proto(region())
    assert (found.id, found.run, found.annotation, found.state) == ("r1", "first", None, "open")
    assert (found.size, found.held_out_size, found.true_label, found.predicted_label) == (40, 12, "ant", "bee")
    assert found.error_rate == Estimate(value=0.5, low=0.25, high=0.75, successes=8, trials=16)


@pytest.mark.parametrize(
    ("verdict", "state"), [("LABEL", "labelled"), ("INVALID", "invalid"), ("MIXED", "mixed"), ("UNSURE", "unsure")]
)
def test_annotated_region(verdict: str, state: str) -> None:
    """The state of a region is the word of its verdict."""
    message = annotation_pb2.Annotation(
        verdict=f"VERDICT_{verdict}", label="ant", annotator="ada", create_time=TIMESTAMP
    )
    found = Region.from_proto(region(annotation=message))
    assert found.state == state
    assert found.annotation == Annotation(verdict=verdict.lower(), label="ant", annotator="ada", create_time=WHEN)


@pytest.mark.parametrize(("name", "parent"), [("r3", ""), ("r3-1", "r3"), ("r3-1-12", "r3-1")])
def test_parent_region(name: str, parent: str) -> None:
    """The id of a part contains that of its region."""
    assert Region.from_proto(region_pb2.Region(name=f"runs/a-run/regions/{name}")).parent_region == parent


def test_pictures() -> None:
    """Pictures of a region are arrays."""
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    message = gateway_service_pb2.GetRegionResponse(
        region=region(), exemplars=tensors.images_to_proto(images), sources=tensors.images_to_proto(images[:1])
    )
    pictures = RegionPictures.from_proto(message)
    assert pictures.region.id == "r1"
    np.testing.assert_array_equal(pictures.exemplars, images)
    np.testing.assert_array_equal(pictures.sources, images[:1])


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Region.from_proto(region()).size = 1  # type: ignore[misc]
