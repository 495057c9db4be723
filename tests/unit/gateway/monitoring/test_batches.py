"""The stored form of a batch, and the rest after deletions."""

import numpy as np
import pytest
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, monitor_pb2

from services.arrays import as_floats
from services.gateway.monitoring import batches
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.triton.preprocessing import preprocess
from tests.monitored import observation, pictures, plant_model

LAYOUT = model_pb2.Preprocessing.Layout


@pytest.mark.parametrize(("layout", "datatype"), [("NCHW", "FP32"), ("NHWC", "FP32"), ("NHWC", "UINT8")])
def test_inputs_become_images(store: ArtifactStore, layout: str, datatype: str) -> None:
    """For any layout and type of the classifier's input."""
    model = plant_model(store)
    model.input_datatype = datatype
    model.preprocessing.layout = LAYOUT.Value(f"LAYOUT_{layout}")
    if datatype == "UINT8":
        model.preprocessing.high = 255
        del model.preprocessing.mean[:], model.preprocessing.std[:]
    images = pictures(3)
    inputs = preprocess(as_floats(images), model)
    observations = [monitor_pb2.Observation(id=str(row), input=one.tobytes()) for row, one in enumerate(inputs)]
    np.testing.assert_array_equal(batches.arrays_of(observations, model)["image"], images)


def test_an_input_that_is_no_number(store: ArtifactStore) -> None:
    """It is named."""
    wrong = monitor_pb2.Observation(id="bad", input=np.full(60, np.inf, np.float32).tobytes())
    with pytest.raises(InvalidInput, match="observation 'bad' has an input that is no finite number"):
        batches.arrays_of([wrong], plant_model(store))


def test_rows_name_themselves(store: ArtifactStore) -> None:
    """Rows are taken out by name, of images too, of which there may be fewer; where there are none nothing changes."""
    scores_alone = monitor_pb2.Observation(id="b", scores=[1, 2, 3])
    arrays = batches.arrays_of([observation("a"), scores_alone, observation("c")], plant_model(store))
    left = batches.without_rows(arrays, {keys.observation_digest("a")})
    assert left is not None
    np.testing.assert_array_equal(left["id"], batches.digests("bc"))
    np.testing.assert_array_equal(left["has_image"], [False, True])
    np.testing.assert_array_equal(left["image"], arrays["image"][1:])
    np.testing.assert_array_equal(left["scores"], arrays["scores"][1:])
    assert batches.without_rows(left, {keys.observation_digest("a")}) is None


def test_the_record_has_a_time(store: ArtifactStore) -> None:
    """That of the report, where its observation has none."""
    [kept] = batches.record_of([observation("a")]).observations
    assert kept.time.seconds > 1_700_000_000
    assert not kept.scores
    assert kept.WhichOneof("image") is None
