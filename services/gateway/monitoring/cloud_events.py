"""CloudEvents 1.0 over HTTP, with Open Inference Protocol payloads in JSON.

A request of n images and its response become n observations, `{id}-{row}`: the images come from the request, the scores
and the version from the response.

The cloudevents SDK (2.2) is not used for two reasons. It gives an event without an id a random one, so that request and
response could not be joined, and it reports a malformed body by any of six exceptions.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, monitor_pb2

from services.arrays import Array
from services.gateway.monitoring.batches import LONGEST_VERSION, MOST_OBSERVATIONS
from services.storage.catalog import format_shape
from services.triton.preprocessing import input_shape, undo_preprocessing

_STRUCTURED = "application/cloudevents+json"
_BATCHED = "application/cloudevents-batch+json"
_VERSION = "1.0"
# Leaves space for the row number that an observation's id ends with.
_LONGEST_ID = 116


@dataclass(frozen=True, kw_only=True)
class CloudEvent:
    """An event with JSON data."""

    id: str
    type: str
    # Time of the event, when it has one.
    time: datetime | None
    data: Any


def parse_event(headers: Mapping[str, str], body: bytes) -> CloudEvent:
    """Return the event of an HTTP request.

    Raises InvalidInput that names the fault.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == _BATCHED:
        raise InvalidInput("events come one a request, not in batches", reason="BAD_EVENT")
    if content_type == _STRUCTURED:
        return _structured(_json(body))
    attributes = {name: headers.get(f"ce-{name}", "") for name in ("specversion", "id", "type", "source", "time")}
    return _event(attributes, _json(body))


def _structured(envelope: Any) -> CloudEvent:
    if not isinstance(envelope, dict):
        raise InvalidInput("a structured event is a JSON object with its attributes and data", reason="BAD_EVENT")
    data = envelope.get("data")
    if "data_base64" in envelope:
        try:
            data = _json(base64.b64decode(str(envelope["data_base64"]), validate=True))
        except binascii.Error as error:
            raise InvalidInput(f"data_base64 is no base64 ({error})", reason="BAD_EVENT") from error
    elif isinstance(data, str):
        data = _json(data.encode())
    return _event(envelope, data)


def _event(attributes: Mapping[str, Any], data: Any) -> CloudEvent:
    if attributes.get("specversion") != _VERSION:
        raise InvalidInput(
            f"the event has specversion {attributes.get('specversion')!r}; send CloudEvents {_VERSION}, in binary "
            "(ce-specversion, ce-id, ce-source, ce-type) or structured content mode",
            reason="BAD_EVENT",
        )
    for name in ("id", "source", "type"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidInput(f"the event has no {name}; CloudEvents need one", reason="BAD_EVENT")
    event_id = attributes["id"]
    if len(event_id) > _LONGEST_ID or not event_id.isprintable():
        raise InvalidInput(
            f"event id {event_id[:_LONGEST_ID]!r} is refused: use 1 to {_LONGEST_ID} printable characters",
            reason="BAD_EVENT",
        )
    return CloudEvent(id=event_id, type=attributes["type"], time=_time(attributes.get("time")), data=data)


def _time(text: Any) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidInput(
            f"the event has time {str(text)[:40]!r}; send it in the format of RFC 3339", reason="BAD_EVENT"
        )
    return moment


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"the event's data are no JSON ({error}); send the JSON of the Open Inference Protocol",
            reason="BAD_EVENT",
        ) from error


REQUEST, RESPONSE = "request", "response"
# Event types of KServe's payload logger.
_TYPES = {
    "org.kubeflow.serving.inference.request": REQUEST,
    "org.kubeflow.serving.inference.response": RESPONSE,
}
_LEAST, _LARGEST = 0, 255


def event_part(event: CloudEvent, model: model_pb2.Model) -> tuple[str, monitor_pb2.ObservationBatch]:
    """Return whether an event is request or response, and its observations.

    Raises InvalidInput for any other event.
    """
    half = _TYPES.get(event.type)
    if half is None:
        raise InvalidInput(f"the event has type {event.type!r}; send one of {', '.join(_TYPES)}", reason="BAD_EVENT")
    if not isinstance(event.data, dict):
        raise InvalidInput("the event's data are no JSON object", reason="BAD_PAYLOAD")
    read: Callable[..., list[monitor_pb2.Observation]] = _images if half == REQUEST else _scores
    batch = monitor_pb2.ObservationBatch(observations=read(event.data, model))
    for row, observation in enumerate(batch.observations):
        observation.id = f"{event.id}-{row}"
        if event.time:
            observation.time.FromDatetime(event.time)
        else:
            observation.time.GetCurrentTime()
    return half, batch


def merge_parts(
    request: monitor_pb2.ObservationBatch, response: monitor_pb2.ObservationBatch
) -> Sequence[monitor_pb2.Observation]:
    """Merge request and response into observations.

    Raises InvalidInput when their numbers of images differ.
    """
    images, scores = request.observations, response.observations
    if len(images) != len(scores):
        raise InvalidInput(
            f"the request has {len(images)} images, its response scores for {len(scores)}", reason="BAD_PAYLOAD"
        )
    for image, answered in zip(images, scores, strict=True):
        image.MergeFrom(answered)
        image.time.CopyFrom(answered.time)
    return list(images)


def _images(data: Mapping[str, Any], model: model_pb2.Model) -> list[monitor_pb2.Observation]:
    tensor = _tensor(data, "inputs", model.input_name)
    if tensor.get("datatype") != model.input_datatype:
        raise InvalidInput(
            f"the input has datatype {tensor.get('datatype')!r}; {names.last(model.name)!r} takes "
            f"{model.input_datatype}",
            reason="BAD_PAYLOAD",
        )
    height, width, channels = model.image_shape
    one = input_shape((1, channels, height, width), model)[1:]
    values = _values(tensor, one, model)
    if model.input_datatype == "UINT8":
        if ((values < _LEAST) | (values > _LARGEST)).any():
            raise InvalidInput("the input has values that are no bytes", reason="BAD_PAYLOAD")
        values = values.astype(np.uint8)
    return [monitor_pb2.Observation(picture=image.tobytes()) for image in undo_preprocessing(values, model)]


def _scores(data: Mapping[str, Any], model: model_pb2.Model) -> list[monitor_pb2.Observation]:
    tensor = _tensor(data, "outputs", model.output_name)
    version = str(data.get("model_version") or "")[:LONGEST_VERSION]
    values = _values(tensor, (len(model.classes),), model)
    return [monitor_pb2.Observation(scores=row, version=version) for row in values]


def _tensor(data: Mapping[str, Any], side: str, name: str) -> Mapping[str, Any]:
    """Return the tensor with this name, or the only tensor."""
    tensors = data.get(side)
    if not isinstance(tensors, list) or not all(isinstance(one, dict) for one in tensors):
        raise InvalidInput(
            f"the payload has no {side}; send the JSON of the Open Inference Protocol (version 2)", reason="BAD_PAYLOAD"
        )
    if len(tensors) == 1:
        return tensors[0]  # type: ignore[no-any-return]
    for tensor in tensors:
        if tensor.get("name") == name:
            return tensor  # type: ignore[no-any-return]
    raise InvalidInput(f"the payload has no {name!r} among its {side}", reason="BAD_PAYLOAD")


def _values(tensor: Mapping[str, Any], one: Sequence[int], model: model_pb2.Model) -> Array:
    """Return the numbers of a tensor (n, *one), flat or nested in JSON."""
    said = tensor.get("shape")
    if not isinstance(said, list) or said[1:] != list(one) or not isinstance(said[0], int) or said[0] < 0:
        raise InvalidInput(
            f"tensor {tensor.get('name')!r} has shape {str(said)[:80]}; of {names.last(model.name)!r} it is "
            f"n x {format_shape(one)}",
            reason="BAD_PAYLOAD",
        )
    if said[0] > MOST_OBSERVATIONS:
        raise InvalidInput(
            f"tensor {tensor.get('name')!r} is of {said[0]} images; an event has {MOST_OBSERVATIONS} at most, send "
            "several",
            reason="TOO_LARGE",
        )
    try:
        values = np.array(tensor.get("data"), np.float32).reshape(said)
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: integers beyond the range of floats
        raise InvalidInput(
            f"the data of tensor {tensor.get('name')!r} are not {format_shape(said)} numbers ({error}); binary data "
            "cannot be read in JSON",
            reason="BAD_PAYLOAD",
        ) from error
    if not np.isfinite(values).all():
        raise InvalidInput(f"tensor {tensor.get('name')!r} has numbers that are not finite", reason="BAD_PAYLOAD")
    return values
