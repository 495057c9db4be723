"""Payloads of inference as halves of observations."""

from typing import Any

import numpy as np
import pytest
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2

from services.gateway.monitoring.batches import MOST_OBSERVATIONS
from services.gateway.monitoring.cloud_events import CloudEvent, event_part, merge_parts
from services.storage.artifacts import ArtifactStore
from tests.events import TYPES, request_of, response_of
from tests.monitored import pictures, plant_model


@pytest.fixture
def model(store: ArtifactStore) -> model_pb2.Model:
    return plant_model(store)


def event(half: str, data: Any) -> CloudEvent:
    return CloudEvent(id="a", type=TYPES[half], time=None, data=data)


def test_a_request_and_its_response(model: model_pb2.Model) -> None:
    """Each image with its scores."""
    images = pictures(2)
    parts = dict(
        event_part(event(half, data), model)
        for half, data in (("request", request_of(images, model)), ("response", response_of([[1, 2, 3], [4, 5, 6]])))
    )
    found = merge_parts(parts["request"], parts["response"])
    assert [one.id for one in found] == ["a-0", "a-1"]
    assert [one.picture for one in found] == [image.tobytes() for image in images]
    assert [list(one.scores) for one in found] == [[1, 2, 3], [4, 5, 6]]
    assert all(one.time.seconds for one in found)


def test_bytes_as_input(model: model_pb2.Model) -> None:
    """They are bytes: nothing else is taken for one."""
    model.input_datatype = "UINT8"
    model.preprocessing.high = 255
    del model.preprocessing.mean[:], model.preprocessing.std[:]
    images = pictures(1)
    tensor = {"shape": [1, 3, 4, 5], "datatype": "UINT8", "data": images.transpose(0, 3, 1, 2).ravel().tolist()}
    _, batch = event_part(event("request", {"inputs": [tensor]}), model)
    assert batch.observations[0].picture == images[0].tobytes()
    tensor["data"][3] = 256  # type: ignore[index]
    with pytest.raises(InvalidInput, match="the input has values that are no bytes"):
        event_part(event("request", {"inputs": [tensor]}), model)


def test_the_output_among_others(model: model_pb2.Model) -> None:
    """It is found by its name; a guarded answer has others beside it."""
    model.output_name = "logits"
    data = response_of([[1, 2, 3]])
    data["outputs"].insert(0, {"name": "defuse_risk", "shape": [1, 1], "datatype": "FP32", "data": [0]})
    _, batch = event_part(event("response", data), model)
    assert list(batch.observations[0].scores) == [1, 2, 3]
    model.output_name = "scores"
    with pytest.raises(InvalidInput, match="the payload has no 'scores' among its outputs"):
        event_part(event("response", data), model)


@pytest.mark.parametrize("data", [[1, None, 3], [1, "NaN", 3], ["a", 2, 3], [[1, 2], [3]], [1, 10**400, 3], None])
def test_data_that_are_no_numbers(model: model_pb2.Model, data: Any) -> None:
    """For any other type."""
    answer = response_of([[1, 2, 3]])
    answer["outputs"][0]["data"] = data
    with pytest.raises(InvalidInput, match=r"not (1x3 numbers|finite)|that are not finite"):
        event_part(event("response", answer), model)


def test_more_images_than_an_event_may_have(model: model_pb2.Model) -> None:
    """It is as many as a batch may have: an event is stored whole."""
    event_part(event("response", response_of(np.zeros((MOST_OBSERVATIONS, 3)))), model)
    with pytest.raises(InvalidInput, match="is of 10001 images; an event has 10000 at most") as refused:
        event_part(event("response", response_of(np.zeros((MOST_OBSERVATIONS + 1, 3)))), model)
    assert refused.value.reason == "TOO_LARGE"


def test_a_shape_that_is_none(model: model_pb2.Model) -> None:
    """A number of images that is none is not told from the data."""
    answer = response_of(np.zeros((2, 3)))
    for shape in ([-1, 3], ["2", 3], [], 6, None):
        answer["outputs"][0]["shape"] = shape
        with pytest.raises(InvalidInput, match="it is n x 3"):
            event_part(event("response", answer), model)
