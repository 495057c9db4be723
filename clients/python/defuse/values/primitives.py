"""Estimates, paired differences, and conversions from protobuf."""

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from defuse.v1 import correction_pb2, tensor_pb2


def to_datetime(timestamp: Timestamp) -> datetime:
    """Return a timestamp as a datetime in UTC."""
    return timestamp.ToDatetime(tzinfo=UTC)


def enum_word(name: str, prefix: str) -> str:
    """Return an enum value's name without its prefix.

    `STATE_SUCCEEDED` becomes `succeeded`, for example.
    """
    return name.removeprefix(f"{prefix}_").lower()


def message_fields(message: Message) -> dict[str, Any]:
    """Return every field of a message by name."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def same_fields(cls: Any, message: Message) -> dict[str, Any]:
    """Return the message fields that a dataclass has, by name."""
    return {field.name: getattr(message, field.name) for field in fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share in [0, 1] with its exact 95 % interval.

    The interval is that of Clopper and Pearson (1934) for `successes` of `trials`.
    """

    value: float
    low: float
    high: float
    successes: int
    trials: int

    @classmethod
    def from_proto(cls, message: tensor_pb2.Estimate) -> Self:
        return cls(**same_fields(cls, message))

    def __str__(self) -> str:
        if not self.trials:
            return "not measured"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.trials})"


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Accuracy after minus accuracy before, on the same images.

    The 95 % interval is the score interval of Tango (1998), and `p_value` is that of McNemar's exact test. Only the
    version after classifies the `gained` images correctly, and only the version before the `lost` ones.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int
    trials: int
    p_value: float

    @classmethod
    def from_proto(cls, message: correction_pb2.PairedDifference) -> Self:
        return cls(**same_fields(cls, message))

    def __str__(self) -> str:
        if not self.trials:
            return "not measured"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"
