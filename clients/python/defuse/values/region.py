"""Regions with their annotations and pictures, and latent interpolations."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.v1 import annotation_pb2, gateway_service_pb2, region_pb2
from defuse.values.primitives import Estimate, enum_word, to_datetime

# (n, h, w, c), or (h, w, c) for a single image
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotator's verdict on a region.

    `verdict` is label (with the class name in `label`), invalid, mixed or unsure.
    """

    verdict: str
    label: str
    annotator: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: annotation_pb2.Annotation) -> Self:
        return cls(
            verdict=enum_word(annotation_pb2.Annotation.Verdict.Name(message.verdict), "VERDICT"),
            label=message.label,
            annotator=message.annotator,
            create_time=to_datetime(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class RealImage:
    """A labelled training image near a region."""

    # Index in the training split.
    index: int
    label: str
    # By the served classifier.
    predicted_label: str
    # In aggregate latent standard deviations, per dimension.
    distance_sd: float

    @classmethod
    def from_proto(cls, message: region_pb2.RealImage) -> Self:
        return cls(
            index=message.index,
            label=message.label,
            predicted_label=message.predicted_label,
            distance_sd=message.distance_sd,
        )


@dataclass(frozen=True, kw_only=True)
class Region:
    """A region: a cluster of failures, tested against controls around it."""

    id: str
    run: str
    # Share of the run's failures, in (0, 1].
    weight: float
    # Failures for correction.
    size: int
    # Different source images of these: failures of one source are one piece of evidence.
    source_count: int
    # Failures excluded from correction, for figures before and after it.
    held_out_size: int
    true_label: str
    predicted_label: str
    # (true label, predicted label, failures), most frequent first; only one, except with mixture kind `plain`.
    profile: list[tuple[str, str, int]]
    # Sort key of regions, in [0, 1], larger is worse: error rate above that of the controls, times its share of the
    # sources with failures.
    score: float
    # Share of the searched real images of the true label inside the region, in [0, 1].
    typicality: float
    # Share of misclassified fresh images.
    error_rate: Estimate
    # Share of misclassified controls: unperturbed images of the nearest sources.
    control_error_rate: Estimate
    # Smallest false discovery rate at which the error rate exceeds that of the controls.
    q_value: float
    # Share of misclassified images among the searched real images inside.
    real_error_rate: Estimate
    # Mean Jaccard index with the matching region over bootstraps, in [0, 1]; at least 0.75 is stable.
    stability: float
    # Median distance to the nearest misclassified training image; None without any.
    novelty_sd: float | None
    # Median perturbation radius of the failures.
    radius_sd: float
    nearest: list[RealImage]
    nearest_misclassified: list[RealImage]
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
            source_count=message.source_count,
            held_out_size=message.held_out_size,
            true_label=message.true_label,
            predicted_label=message.predicted_label,
            profile=[(entry.true_label, entry.predicted_label, entry.count) for entry in message.profile],
            score=message.score,
            typicality=message.typicality,
            error_rate=Estimate.from_proto(message.error_rate),
            control_error_rate=Estimate.from_proto(message.control_error_rate),
            q_value=message.q_value,
            real_error_rate=Estimate.from_proto(message.real_error_rate),
            stability=message.stability,
            novelty_sd=message.novelty_sd if message.HasField("novelty_sd") else None,
            radius_sd=message.radius_sd,
            nearest=[RealImage.from_proto(image) for image in message.nearest],
            nearest_misclassified=[RealImage.from_proto(image) for image in message.nearest_misclassified],
            suggested_label=message.suggested_label,
            suggestion_reason=message.suggestion_reason,
            annotation=Annotation.from_proto(message.annotation) if annotated else None,
        )

    @property
    def parent_region(self) -> str:
        """Return the id of the region that this part was split from.

        It is `r3` for the part `r3-1`, and empty for other regions.
        """
        return self.id.rpartition("-")[0]

    @property
    def state(self) -> str:
        """Return `open`, or the verdict: labelled, invalid, mixed or unsure."""
        if not self.annotation:
            return "open"
        return "labelled" if self.annotation.verdict == "label" else self.annotation.verdict


@dataclass(frozen=True, kw_only=True)
class RegionPictures:
    """A region with pictures, (n, h, w, c) each."""

    region: Region
    # Failures, the medoid first.
    exemplars: Images
    # Source images of the exemplars.
    sources: Images
    # Of `region.nearest`.
    nearest: Images
    # Of `region.nearest_misclassified`.
    nearest_misclassified: Images

    @classmethod
    def from_proto(cls, message: gateway_service_pb2.GetRegionResponse) -> Self:
        return cls(
            region=Region.from_proto(message.region),
            exemplars=tensors.images_from_proto(message.exemplars),
            sources=tensors.images_from_proto(message.sources),
            nearest=tensors.images_from_proto(message.nearest),
            nearest_misclassified=tensors.images_from_proto(message.nearest_misclassified),
        )


@dataclass(frozen=True, kw_only=True)
class RegionPair:
    """A region of one run and the matching region of another."""

    before: Region
    after: Region
    # Distance of the means, in standard deviations of the regions.
    shift_sd: float
    # Whether the distance exceeds chance.
    moved: bool

    @classmethod
    def from_proto(cls, message: region_pb2.RegionPair) -> Self:
        return cls(
            before=Region.from_proto(message.before),
            after=Region.from_proto(message.after),
            shift_sd=message.shift_sd,
            moved=message.moved,
        )


@dataclass(frozen=True, kw_only=True)
class RegionsDiff:
    """The differences between the regions of two runs."""

    # Only in the second run, largest score first.
    added: list[Region]
    # Only in the first run, largest score first.
    gone: list[Region]
    # In both runs, smallest shift first.
    kept: list[RegionPair]

    @classmethod
    def from_proto(cls, message: region_pb2.RegionsDiff) -> Self:
        return cls(
            added=[Region.from_proto(region) for region in message.added],
            gone=[Region.from_proto(region) for region in message.gone],
            kept=[RegionPair.from_proto(pair) for pair in message.kept],
        )


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Images on a line in latent space, with the predicted classes."""

    # (frames, h, w, c)
    images: Images
    # (frames,) class indices
    predicted_labels: tuple[int, ...]
