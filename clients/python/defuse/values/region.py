"""A region of failures, its pictures, and what a person says it shows."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.v1 import annotation_pb2, gateway_service_pb2, region_pb2
from defuse.values.estimate import Estimate
from defuse.values.plain import moment, word

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotator's verdict: label (with the class name), invalid, mixed or unsure."""

    verdict: str
    label: str
    annotator: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: annotation_pb2.Annotation) -> Self:
        return cls(
            verdict=word(annotation_pb2.Annotation.Verdict.Name(message.verdict), "VERDICT"),
            label=message.label,
            annotator=message.annotator,
            create_time=moment(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class Region:
    """A misclassification region."""

    id: str
    run: str
    # Share of the run's failures, in (0, 1].
    weight: float
    # Failures that correction may use.
    size: int
    # Failures kept for before/after figures.
    held_out_size: int
    true_label: str
    predicted_label: str
    # Share of fresh decodes that the classifier gets wrong.
    error_rate: Estimate
    suggested_label: str
    suggestion_reason: str
    annotation: Annotation | None

    @classmethod
    def from_proto(cls, message: region_pb2.Region) -> Self:
        annotated = message.HasField("annotation")
        return cls(
            id=names.last(message.name),
            run=names.last(names.parent(message.name)),
            weight=message.weight,
            size=message.size,
            held_out_size=message.held_out_size,
            true_label=message.true_label,
            predicted_label=message.predicted_label,
            error_rate=Estimate.from_proto(message.error_rate),
            suggested_label=message.suggested_label,
            suggestion_reason=message.suggestion_reason,
            annotation=Annotation.from_proto(message.annotation) if annotated else None,
        )

    @property
    def state(self) -> str:
        """Return `open`, or the verdict: labelled, invalid, mixed, unsure."""
        if not self.annotation:
            return "open"
        return "labelled" if self.annotation.verdict == "label" else self.annotation.verdict


@dataclass(frozen=True, kw_only=True)
class RegionPictures:
    """A region with pictures: failures, the medoid first, and the real images they are perturbations of."""

    region: Region
    # (n, h, w, c)
    exemplars: Images
    # (n, h, w, c)
    sources: Images

    @classmethod
    def from_proto(cls, message: gateway_service_pb2.GetRegionResponse) -> Self:
        return cls(
            region=Region.from_proto(message.region),
            exemplars=tensors.images_from_proto(message.exemplars),
            sources=tensors.images_from_proto(message.sources),
        )
