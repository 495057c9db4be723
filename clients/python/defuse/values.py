"""What the client returns: small frozen values, with plain ids instead of resource names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from google.protobuf.timestamp_pb2 import Timestamp

from defuse import names, tensors
from defuse.errors import InvalidInput
from defuse.v1 import (
    annotation_pb2,
    correction_pb2,
    dataset_pb2,
    gateway_service_pb2,
    model_pb2,
    region_pb2,
    release_pb2,
    run_pb2,
    tensor_pb2,
)

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share in [0, 1] measured by counting, with its exact 95 % interval (Clopper and Pearson, 1934)."""

    value: float
    low: float
    high: float
    successes: int
    trials: int

    @classmethod
    def from_proto(cls, message: tensor_pb2.Estimate) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        if not self.trials:
            return "not measured"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.trials})"


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
            output=model_pb2.Model.Output.Name(message.output).removeprefix("OUTPUT_").lower(),
            image_shape=tuple(message.image_shape),
            champion_version=message.champion_version,
            create_time=_time(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled images."""

    id: str
    display_name: str
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
class SearchCounts:
    """What a search tried and found."""

    sources: int
    sources_wrong_on_image: int
    sources_wrong_on_reconstruction: int
    decodes: int
    candidates: int
    rejected_by_label_model: int
    rejected_by_source_limit: int
    failures: int

    @classmethod
    def from_proto(cls, message: run_pb2.SearchCounts) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the loop. `state` is preparing, identifying, distilling, succeeded, failed or cancelled."""

    id: str
    state: str
    model: str
    model_version: int
    dataset: str
    seed: int
    # Share of the present stage that is done.
    progress: float
    note: str
    error: str
    counts: SearchCounts
    region_count: int
    config: Mapping[str, Any]
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Self:
        config = message.config
        return cls(
            id=names.last(message.name),
            state=_state(run_pb2.Run.State.Name(message.state)),
            model=names.last(config.model),
            model_version=config.model_version,
            dataset=names.last(config.dataset),
            seed=config.seed,
            progress=message.progress,
            note=message.note,
            error=message.error,
            counts=SearchCounts.from_proto(message.counts),
            region_count=message.region_count,
            config={section: _settings(getattr(config, section)) for section in ("search", "vae", "mixture")},
            create_time=_time(message.create_time),
            update_time=_time(message.update_time),
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}


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
            verdict=annotation_pb2.Annotation.Verdict.Name(message.verdict).removeprefix("VERDICT_").lower(),
            label=message.label,
            annotator=message.annotator,
            create_time=_time(message.create_time),
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
            state=_state(correction_pb2.Correction.State.Name(message.state)),
            progress=message.progress,
            note=message.note,
            error=message.error,
            regions=tuple(RegionChange.from_proto(change) for change in result.regions),
            parity={entry.batch_size: entry.max_abs_difference for entry in result.parity},
            candidate=result.candidate,
            candidate_version=result.candidate_version,
            create_time=_time(message.create_time),
            **{name: Estimate.from_proto(getattr(result, name)) for name in figures},
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A change of the version that callers get. `kind` is registered, released or rolled_back."""

    model: str
    kind: str
    version: int
    previous_version: int
    correction: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: release_pb2.Release) -> Self:
        return cls(
            model=names.last(message.model),
            kind=release_pb2.Release.Kind.Name(message.kind).removeprefix("KIND_").lower(),
            version=message.version,
            previous_version=message.previous_version,
            correction=message.correction,
            create_time=_time(message.create_time),
        )


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def _state(name: str) -> str:
    return name.removeprefix("STATE_").lower()


def _settings(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
