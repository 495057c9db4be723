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
class RealImage:
    """A labelled training image near a region."""

    # Row of the training split.
    index: int
    label: str
    # What the served classifier takes it for.
    predicted_label: str
    # In aggregate latent sds, per dimension.
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
    """A misclassification region: failures that belong together, tested against what lies around them."""

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
    # (true label, predicted label, failures), most frequent first; one, unless the mixture is plain.
    profile: list[tuple[str, str, int]]
    # What regions are sorted by, in [0, 1], larger is worse: how much larger the error rate is than the controls',
    # times the typicality.
    score: float
    # Share of the searched real images of its label that lie inside, in [0, 1].
    typicality: float
    # Share of fresh decodes that the classifier gets wrong.
    error_rate: Estimate
    # The same for unperturbed reconstructions of the real images nearest to it.
    control_error_rate: Estimate
    # Least false discovery rate at which it is worse than its controls.
    q_value: float
    # Share of the searched real images inside that the classifier gets wrong.
    real_error_rate: Estimate
    # Jaccard index with its like over bootstraps, in [0, 1]; from 0.75 on a region is called stable.
    stability: float
    # Median distance to the nearest misclassified training image; None where there is none.
    novelty_sd: float | None
    # Median size of the steps that made its failures.
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
    def whole(self) -> str:
        """Return the id of the region that it is a part of, `r3` of `r3-1`; nothing where it is none."""
        return self.id.rpartition("-")[0]

    @property
    def state(self) -> str:
        """Return `open`, or the verdict: labelled, invalid, mixed, unsure."""
        if not self.annotation:
            return "open"
        return "labelled" if self.annotation.verdict == "label" else self.annotation.verdict

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from defuse import notebook

        return notebook.of_region(self)


@dataclass(frozen=True, kw_only=True)
class RegionPictures:
    """A region with pictures, (n, h, w, c) each."""

    region: Region
    # Failures, the medoid first.
    exemplars: Images
    # The real images that these are perturbations of.
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

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from defuse import notebook

        return notebook.of_pictures(self)


@dataclass(frozen=True, kw_only=True)
class RegionPair:
    """A region of one run and its like in another."""

    before: Region
    after: Region
    # Distance of the means in units of the regions' own spread.
    shift_sd: float
    # Whether that is more than chance.
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
    """What became of the regions of one run in another."""

    # Regions that only the second run has, largest score first.
    added: list[Region]
    # Regions that only the first run has, largest score first.
    gone: list[Region]
    # What both have, least shift first.
    kept: list[RegionPair]

    @classmethod
    def from_proto(cls, message: region_pb2.RegionsDiff) -> Self:
        return cls(
            added=[Region.from_proto(region) for region in message.added],
            gone=[Region.from_proto(region) for region in message.gone],
            kept=[RegionPair.from_proto(pair) for pair in message.kept],
        )
