"""A correction and what it changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import correction_pb2
from defuse.values.estimate import Estimate
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class RegionChange:
    """Accuracy on one region's held-out images, before and after."""

    region: str
    label: str
    before: Estimate
    after: Estimate

    @classmethod
    def from_proto(cls, message: correction_pb2.RegionChange) -> Self:
        return cls(
            region=names.last(message.region),
            label=message.label,
            before=Estimate.from_proto(message.before),
            after=Estimate.from_proto(message.after),
        )


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A fine-tuning of the deployed weights. `state` is running, succeeded or failed."""

    id: str
    run: str
    model: str
    base_version: int
    # lambda
    region_weight: float
    state: str
    progress: float
    note: str
    error: str
    test_before: Estimate
    test_after: Estimate
    regions_before: Estimate
    regions_after: Estimate
    regions: tuple[RegionChange, ...]
    # Largest difference between torch and ONNX Runtime for each batch size.
    parity: Mapping[int, float]
    candidate: str
    candidate_version: int
    create_time: datetime

    @classmethod
    def from_proto(cls, message: correction_pb2.Correction) -> Self:
        result = message.result
        figures = ("test_before", "test_after", "regions_before", "regions_after")
        return cls(
            id=names.last(message.name),
            run=names.last(names.parent(message.name)),
            model=names.last(message.model),
            base_version=message.base_version,
            region_weight=message.config.region_weight,
            state=word(correction_pb2.Correction.State.Name(message.state), "STATE"),
            progress=message.progress,
            note=message.note,
            error=message.error,
            regions=tuple(RegionChange.from_proto(change) for change in result.regions),
            parity={entry.batch_size: entry.max_abs_difference for entry in result.parity},
            candidate=result.candidate,
            candidate_version=result.candidate_version,
            create_time=moment(message.create_time),
            **{name: Estimate.from_proto(getattr(result, name)) for name in figures},
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed"}
