"""What is stored of a batch: a record without images and scores, and arrays whose rows name themselves.

Because each row has its name, what is deleted of a batch can be taken out of each of its files on its own, in any order
and again after a crash.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, monitor_pb2

from services.arrays import Array
from services.storage import keys
from services.triton.preprocessing import restored

_DTYPES: dict[str, npt.DTypeLike] = {"FP32": "<f4", "UINT8": "u1"}
# Arrays with a row for each image alone; all others have one for each observation.
_OF_IMAGES = ("image",)


def record_of(observations: Sequence[monitor_pb2.Observation]) -> monitor_pb2.ObservationBatch:
    """Return observations without their images and scores; what has no time was answered now."""
    batch = monitor_pb2.ObservationBatch()
    for observation in observations:
        kept = batch.observations.add(id=observation.id, version=observation.version, truth=observation.truth)
        if observation.HasField("time"):
            kept.time.CopyFrom(observation.time)
        else:
            kept.time.GetCurrentTime()
    return batch


def arrays_of(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> dict[str, Array]:
    """Return images and scores of checked observations as catalog.observed_images says.

    Raises InvalidInput for an input that is no number.
    """
    return {
        "id": digests(observation.id for observation in observations),
        "has_image": np.array([observation.WhichOneof("image") is not None for observation in observations], bool),
        "image": _images(observations, model),
        "has_scores": np.array([bool(observation.scores) for observation in observations], bool),
        "scores": np.array(
            [observation.scores or np.zeros(len(model.classes)) for observation in observations], np.float32
        ).reshape(len(observations), len(model.classes)),
    }


def digests(ids: Any) -> Array:
    """Return the names of rows (n, 16) uint8."""
    return np.frombuffer(b"".join(map(keys.observation_digest, ids)), np.uint8).reshape(-1, 16)


def without(arrays: Mapping[str, Array], gone: Collection[bytes]) -> dict[str, Array] | None:
    """Return arrays without the rows that have these names; None where there are none of them."""
    kept = np.array([name.tobytes() not in gone for name in arrays["id"]], bool)
    if kept.all():
        return None
    images_kept = kept[arrays["has_image"]] if "has_image" in arrays else kept
    return {name: array[images_kept if name in _OF_IMAGES else kept] for name, array in arrays.items()}


def _images(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> Array:
    """Return the images (m, h, w, c) uint8 of the observations that have one, inputs turned back into them."""
    shown = [observation for observation in observations if observation.WhichOneof("image")]
    images = np.zeros((len(shown), *model.image_shape), np.uint8)
    for row, observation in enumerate(shown):
        if observation.WhichOneof("image") == "picture":
            images[row] = np.frombuffer(observation.picture, np.uint8).reshape(*model.image_shape)
        else:
            images[row] = _restored(observation, model)
    return images


def _restored(observation: monitor_pb2.Observation, model: model_pb2.Model) -> Array:
    height, width, channels = model.image_shape
    last = model.preprocessing.layout == model_pb2.Preprocessing.LAYOUT_NHWC
    shape = (1, height, width, channels) if last else (1, channels, height, width)
    values = np.frombuffer(observation.input, _DTYPES[model.input_datatype]).reshape(shape)
    if not np.isfinite(values).all():
        raise InvalidInput(
            f"observation {observation.id!r} has an input that is no finite number; send what the classifier got",
            reason="BAD_OBSERVATION",
            metadata={"id": observation.id},
        )
    image: Array = restored(values, model)[0]
    return image
