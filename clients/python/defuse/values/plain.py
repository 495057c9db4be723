"""Protobuf's times, enum values and messages as plain Python has them."""

from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def moment(stamp: Timestamp) -> datetime:
    """Return a time that knows its zone."""
    return stamp.ToDatetime(tzinfo=UTC)


def word(name: str, kind: str) -> str:
    """Return the word in an enum value's name: `succeeded` of `STATE_SUCCEEDED`, whose kind is `STATE`."""
    return name.removeprefix(f"{kind}_").lower()


def settings(message: Message) -> dict[str, Any]:
    """Return every field of a message of settings by name."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
