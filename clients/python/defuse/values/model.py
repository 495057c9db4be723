"""A classifier, how it takes its images, and which of its versions callers get."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, release_pb2
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The map from stored pixels to the classifier's input: `(low + pixel / 255 * (high - low) - mean) / std`."""

    layout: str = "NCHW"
    low: float = 0.0
    high: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def to_proto(self) -> model_pb2.Preprocessing:
        if self.layout not in {"NCHW", "NHWC"}:
            raise InvalidInput(f"layout {self.layout!r} is unknown; use NCHW or NHWC")
        return model_pb2.Preprocessing(
            layout=model_pb2.Preprocessing.Layout.Value(f"LAYOUT_{self.layout}"),
            low=self.low,
            high=self.high,
            mean=self.mean,
            std=self.std,
        )

    @classmethod
    def from_proto(cls, message: model_pb2.Preprocessing) -> Self:
        layout = model_pb2.Preprocessing.Layout.Name(message.layout).removeprefix("LAYOUT_")
        return cls(layout=layout, low=message.low, high=message.high, mean=tuple(message.mean), std=tuple(message.std))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A classifier under test."""

    id: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    output: str
    # Height, width, channels.
    image_shape: tuple[int, ...]
    # Version that callers get now.
    champion_version: int
    create_time: datetime

    @classmethod
    def from_proto(cls, message: model_pb2.Model) -> Self:
        return cls(
            id=names.last(message.name),
            classes=tuple(message.classes),
            preprocessing=Preprocessing.from_proto(message.preprocessing),
            output=word(model_pb2.Model.Output.Name(message.output), "OUTPUT"),
            image_shape=tuple(message.image_shape),
            champion_version=message.champion_version,
            create_time=moment(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class Release:
    """A change of the version that callers get. `kind` is registered, released or rolled_back.

    `verdict` is the id of what the gate said of a release, `approver` who let it through where that was no.
    """

    model: str
    kind: str
    version: int
    previous_version: int
    correction: str
    verdict: str
    actor: str
    reason: str
    approver: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: release_pb2.Release) -> Self:
        return cls(
            model=names.last(message.model),
            kind=word(release_pb2.Release.Kind.Name(message.kind), "KIND"),
            version=message.version,
            previous_version=message.previous_version,
            correction=message.correction,
            verdict=names.last(message.verdict),
            actor=message.actor,
            reason=message.reason,
            approver=message.approver,
            create_time=moment(message.create_time),
        )
