"""Batches of observations: their validation and their stored form.

Each row carries the id of its observation. Deleted observations can therefore be removed from each file of a batch
separately, in any order and again after a crash.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

from services.arrays import Array
from services.gateway.monitoring.config import MonitoredModel
from services.storage import keys
from services.storage.catalog import format_shape
from services.triton.preprocessing import undo_preprocessing

# Name of the folder of an hour, in UTC.
HOUR = "%Y-%m-%d-%H"
MOST_OBSERVATIONS = 10_000
MOST_BYTES = 64 << 20
_LONGEST_ID = 128
LONGEST_VERSION = 64
# The end of the year 9999, the largest timestamp.
_LATEST_S = 253_402_300_799
_VALUE_BYTES = {"FP32": 4, "UINT8": 1}


@dataclass(frozen=True, kw_only=True)
class ReceivedBatch:
    """The observations of one report and their batch id."""

    id: str
    observations: Sequence[monitor_pb2.Observation]


async def receive_batch(
    requests: AsyncIterator[pb.ReportRequest], subject_of: Callable[[str], Awaitable[MonitoredModel]]
) -> tuple[MonitoredModel, ReceivedBatch]:
    """Return the model and the batch of a report.

    Raises InvalidInput for a report that is empty or too large.
    """
    first = await anext(aiter(requests), None)
    if first is None:
        raise InvalidInput(
            "the report has no messages; send model, batch id and observations", reason="EMPTY_REPORT", field="model"
        )
    batch_id = names.check_id("batch", first.batch_id, field="batch_id")
    subject = await subject_of(names.check(first.model, "models/*", field="model"))
    observations: list[monitor_pb2.Observation] = []
    size = 0
    async for request in _all(first, requests):
        size += request.ByteSize()
        observations.extend(request.observations)
        _check_size(len(observations), size)
    return subject, ReceivedBatch(id=batch_id, observations=observations)


async def _all(first: pb.ReportRequest, rest: AsyncIterator[pb.ReportRequest]) -> AsyncIterator[pb.ReportRequest]:
    yield first
    async for request in rest:
        yield request


def _check_size(count: int, size: int) -> None:
    if count > MOST_OBSERVATIONS or size > MOST_BYTES:
        raise InvalidInput(
            f"the batch has more than {MOST_OBSERVATIONS} observations or {MOST_BYTES >> 20} MiB, the limits; report "
            "several batches",
            reason="TOO_LARGE",
            field="observations",
        )


def check_batch(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> None:
    """Raise InvalidInput that names the first invalid observation."""
    seen: set[str] = set()
    for number, observation in enumerate(observations):
        fault = _fault(observation, model)
        if not fault and observation.id in seen:
            fault = "is there twice in the batch; give each its own id"
        if fault:
            raise InvalidInput(
                f"observation {observation.id[:_LONGEST_ID]!r} {fault}",
                reason="BAD_OBSERVATION",
                field=f"observations[{number}]",
                metadata={"id": observation.id[:_LONGEST_ID]},
            )
        seen.add(observation.id)


def _fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    """Return the fault of an observation and its remedy, or ""."""
    if not (0 < len(observation.id) <= _LONGEST_ID and observation.id.isprintable()):
        return f"has an id that is refused: use 1 to {_LONGEST_ID} printable characters"
    if not 0 <= observation.time.seconds <= _LATEST_S:
        return f"has a time of {observation.time.seconds} s; give seconds since 1970"
    if len(observation.version) > LONGEST_VERSION:
        return f"has a version of {len(observation.version)} characters; use at most {LONGEST_VERSION}"
    if observation.truth and observation.truth not in model.classes:
        return (
            f"shows {observation.truth!r}, which is not a class of {names.last(model.name)!r}; name one of its classes"
        )
    return _image_fault(observation, model) or _scores_fault(observation, model)


def _image_fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    kind = observation.WhichOneof("image")
    if kind is None:
        return "" if observation.scores else "has neither an image nor scores; send one of them at least"
    pixels = math.prod(model.image_shape)
    wanted = pixels * (_VALUE_BYTES[model.input_datatype] if kind == "input" else 1)
    if (size := len(getattr(observation, kind))) == wanted:
        return ""
    what = f"inputs ({model.input_datatype})" if kind == "input" else "pictures"
    sizes = format_shape(model.image_shape)
    return f"has an image of {size} bytes; {what} of {sizes} for {names.last(model.name)!r} have {wanted}"


def _scores_fault(observation: monitor_pb2.Observation, model: model_pb2.Model) -> str:
    if observation.scores and len(observation.scores) != len(model.classes):
        return (
            f"has {len(observation.scores)} scores; {names.last(model.name)!r} answers {len(model.classes)}, "
            "one for each class"
        )
    if not np.isfinite(np.array(observation.scores)).all():
        return "has scores that are no finite numbers; send the classifier's answer"
    return ""


_DTYPES: dict[str, npt.DTypeLike] = {"FP32": "<f4", "UINT8": "u1"}
# Arrays with one row for each image; all others have one for each observation.
_OF_IMAGES = ("image",)


def record_of(observations: Sequence[monitor_pb2.Observation]) -> monitor_pb2.ObservationBatch:
    """Return observations without images and scores.

    The present time replaces a missing one.
    """
    batch = monitor_pb2.ObservationBatch()
    for observation in observations:
        kept = batch.observations.add(id=observation.id, version=observation.version, truth=observation.truth)
        if observation.HasField("time"):
            kept.time.CopyFrom(observation.time)
        else:
            kept.time.GetCurrentTime()
    return batch


def arrays_of(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> dict[str, Array]:
    """Return images and scores of valid observations.

    `keys.observed_images` describes the arrays. Raises InvalidInput for an input that is not a number.
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
    """Return the row ids of observations, (n, 16) uint8."""
    return np.frombuffer(b"".join(map(keys.observation_digest, ids)), np.uint8).reshape(-1, 16)


def without_rows(arrays: Mapping[str, Array], gone: Collection[bytes]) -> dict[str, Array] | None:
    """Return arrays without the rows of these ids.

    Returns None when the arrays have none of these rows.
    """
    kept = np.array([name.tobytes() not in gone for name in arrays["id"]], bool)
    if kept.all():
        return None
    images_kept = kept[arrays["has_image"]] if "has_image" in arrays else kept
    return {name: array[images_kept if name in _OF_IMAGES else kept] for name, array in arrays.items()}


def _images(observations: Sequence[monitor_pb2.Observation], model: model_pb2.Model) -> Array:
    """Return the images (m, h, w, c) uint8 of the observations that have one.

    Model inputs are converted back to images.
    """
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
            f"observation {observation.id!r} has an input that is no finite number; send the classifier's input",
            reason="BAD_OBSERVATION",
            metadata={"id": observation.id},
        )
    image: Array = undo_preprocessing(values, model)[0]
    return image
