"""What says of live images which known region they fall in."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import guard_pb2
from defuse.values.estimate import Estimate
from defuse.values.plain import moment


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A guard, served beside its model: `guarded_model` is the name in Triton that answers both with one request."""

    id: str
    model: str
    run: str
    # Region ids to the labels that people gave them, in the order of `defuse_region_index`.
    regions: Mapping[str, str]
    # Stated, and measured on images of the test split that are read correctly.
    false_alarm_rate: float
    measured_false_alarm_rate: Estimate
    threshold: float
    calibration_images: int
    # Share of the held-out failures of its regions that it finds, and of the test images that are misread, wherever.
    recall: Estimate
    misread_recall: Estimate
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
            regions={names.last(one.region): one.label for one in message.regions},
            false_alarm_rate=message.false_alarm_rate,
            measured_false_alarm_rate=Estimate.from_proto(message.measured_false_alarm_rate),
            threshold=message.threshold,
            calibration_images=message.calibration_images,
            recall=Estimate.from_proto(message.recall),
            misread_recall=Estimate.from_proto(message.misread_recall),
            guard_model=message.guard_model,
            guarded_model=message.guarded_model,
            model_version=message.model_version,
            create_time=moment(message.create_time),
        )
