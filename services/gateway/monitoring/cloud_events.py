"""CloudEvents 1.0 over HTTP, in binary and in structured content mode."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from defuse.errors import InvalidInput

_STRUCTURED = "application/cloudevents+json"
_BATCHED = "application/cloudevents-batch+json"
_VERSION = "1.0"
# So that an observation's id, which has a row's number behind it, is not too long.
_LONGEST_ID = 116


@dataclass(frozen=True, kw_only=True)
class CloudEvent:
    """An event whose data are JSON."""

    id: str
    type: str
    # When it happened, where it says so.
    time: datetime | None
    data: Any


def parsed(headers: Mapping[str, str], body: bytes) -> CloudEvent:
    """Return the event that a request carries; raise InvalidInput that says what is wrong with it."""
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
        raise InvalidInput(f"the event has time {str(text)[:40]!r}; send it as RFC 3339 says", reason="BAD_EVENT")
    return moment


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"the event's data are no JSON ({error}); send what the Open Inference Protocol has in JSON",
            reason="BAD_EVENT",
        ) from error
