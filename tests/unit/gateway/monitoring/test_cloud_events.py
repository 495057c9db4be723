"""Events as they come over HTTP."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from defuse.errors import InvalidInput

from services.gateway.monitoring.cloud_events import CloudEvent, parse_event
from tests.events import TYPES, attributes, binary, structured, structured_in_base64

DATA = {"inputs": []}
SAID = attributes("a", "request", time="2026-11-26T14:45:00Z")


def read(event: tuple[dict[str, str], bytes]) -> CloudEvent:
    headers, body = event
    return parse_event({name.lower(): value for name, value in headers.items()}, body)


@pytest.mark.parametrize("mode", [binary, structured, structured_in_base64])
def test_content_modes_say_the_same(mode: Any) -> None:
    """Attributes in headers or in the body, data as JSON or as bytes."""
    moment = datetime(2026, 11, 26, 14, 45, tzinfo=UTC)
    assert read(mode(SAID, DATA)) == CloudEvent(id="a", type=TYPES["request"], time=moment, data=DATA)


def test_data_as_a_string() -> None:
    """Some senders put JSON into JSON."""
    assert read(structured(SAID, json.dumps(DATA))).data == DATA


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[1]", "a structured event is a JSON object"),
        (b'{"specversion": "1.0", "data_base64": "%"}', "data_base64 is no base64"),
        (b'{"specversion": "1.0", "id": 7}', "the event has no id"),
        (b"[" * 100_000, "the event's data are no JSON"),
    ],
)
def test_envelopes_that_are_refused(body: bytes, words: str) -> None:
    """With a sentence, whatever comes."""
    with pytest.raises(InvalidInput, match=words):
        parse_event({"content-type": "application/cloudevents+json"}, body)


def test_a_time_without_a_zone() -> None:
    """It could be any."""
    with pytest.raises(InvalidInput, match="the event has time '2026-11-26T14:45:00'"):
        read(binary({**SAID, "time": "2026-11-26T14:45:00"}, DATA))
