"""Models with their preprocessing, data sets, and guards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import dataset_pb2, guard_pb2, model_pb2
from defuse.values.primitives import Estimate, enum_word, to_datetime


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The map from stored pixels to the classifier's input.

    A pixel in [0, 255] becomes `(low + pixel / 255 * (high - low) - mean) / std`, with
    `mean` and `std` per channel. `layout` is NCHW or NHWC.
    """

    layout: str = "NCHW"
    low: float = 0.0
    high: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def to_proto(self) -> model_pb2.Preprocessing:
        """Return the message.

        Raises InvalidInput for an unknown layout.
        """
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
    """A classifier under test. `output` is logits or probabilities."""

    id: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    output: str
    # Height, width, channels.
    image_shape: tuple[int, ...]
    # The released version.
    champion_version: int
    create_time: datetime

    @classmethod
    def from_proto(cls, message: model_pb2.Model) -> Self:
        return cls(
            id=names.last(message.name),
            classes=tuple(message.classes),
            preprocessing=Preprocessing.from_proto(message.preprocessing),
            output=enum_word(model_pb2.Model.Output.Name(message.output), "OUTPUT"),
            image_shape=tuple(message.image_shape),
            champion_version=message.champion_version,
            create_time=to_datetime(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set: labelled images in splits."""

    id: str
    display_name: str
    # Height, width, channels.
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    # Images per split.
    sizes: Mapping[str, int]

    @classmethod
    def from_proto(cls, message: dataset_pb2.Dataset) -> Self:
        return cls(
            id=names.last(message.name),
            display_name=message.display_name,
            image_shape=tuple(message.image_shape),
            classes=tuple(message.classes),
            sizes={split.name: split.size for split in message.splits},
        )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A guard: an ONNX model that finds known regions in live images.

    Triton serves it beside its model. `guarded_model` is the ensemble of both, which
    answers in one request.
    """

    id: str
    model: str
    run: str
    # Annotated labels by region id, in the order of `defuse_region_index`.
    regions: Mapping[str, str]
    # Requested rate, and its measurement on correctly classified test images.
    false_alarm_rate: float
    measured_false_alarm_rate: Estimate
    threshold: float
    calibration_images: int
    # Share of the regions' held-out failures inside a region, and of all misclassified test images.
    recall: Estimate
    misread_recall: Estimate
    # Names in Triton.
    guard_model: str
    guarded_model: str
    model_version: int
    create_time: datetime

    @classmethod
    def from_proto(cls, message: guard_pb2.Guard) -> Self:
        return cls(
            id=names.last(message.name),
            model=names.last(names.parent(message.name)),
            run=names.last(message.run),
            regions={names.last(region.region): region.label for region in message.regions},
            false_alarm_rate=message.false_alarm_rate,
            measured_false_alarm_rate=Estimate.from_proto(message.measured_false_alarm_rate),
            threshold=message.threshold,
            calibration_images=message.calibration_images,
            recall=Estimate.from_proto(message.recall),
            misread_recall=Estimate.from_proto(message.misread_recall),
            guard_model=message.guard_model,
            guarded_model=message.guarded_model,
            model_version=message.model_version,
            create_time=to_datetime(message.create_time),
        )
