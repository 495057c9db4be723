"""Runs with their counts, failures, and cost estimates."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from defuse import names
from defuse.v1 import failure_pb2, generator_service_pb2, region_pb2, run_pb2
from defuse.values.primitives import Estimate, enum_word, message_fields, same_fields, to_datetime

# Sections of a run's configuration; each is a message.
SECTIONS = ("search", "vae", "validity", "preflight", "mixture")


@dataclass(frozen=True, kw_only=True)
class SearchCounts:
    """The counts of a search."""

    sources: int
    sources_wrong_on_image: int
    sources_wrong_on_reconstruction: int
    # Perturbations rejected before decoding: their latents no longer carry the source's label.
    screened_out: int
    # Perturbations that were decoded and classified.
    decodes: int
    # Misclassified ones among them.
    candidates: int
    # Candidates by the first failed check.
    rejected_by_radius: int
    rejected_by_label_model: int
    rejected_by_typicality: int
    rejected_by_neighbours: int
    rejected_by_round_trip: int
    rejected_by_oracle: int
    rejected_by_confirmation: int
    rejected_by_source_limit: int
    failures: int
    # Further work, without that for perturbations.
    decodes_again: int
    encodes: int
    classifications: int

    @classmethod
    def from_proto(cls, message: run_pb2.SearchCounts) -> Self:
        return cls(**same_fields(cls, message))


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """The comparison of both renderings on a few sources, before the search."""

    # The rendering that follows, "decoder" or "residual".
    rendering: str
    sources: int
    # Share of the sources whose unperturbed reconstruction is misclassified.
    reconstructions_lost: Estimate
    # Shares of the misclassified perturbations that passed every check.
    decoder_valid: Estimate
    residual_valid: Estimate
    # Of the hypothesis that valid failures are not more frequent with "residual".
    p_value: float

    @classmethod
    def from_proto(cls, message: run_pb2.Pilot) -> Self:
        return cls(
            rendering=enum_word(run_pb2.SearchConfig.Rendering.Name(message.rendering), "RENDERING"),
            sources=message.sources,
            reconstructions_lost=Estimate.from_proto(message.reconstructions_lost),
            decoder_valid=Estimate.from_proto(message.decoder.valid),
            residual_valid=Estimate.from_proto(message.residual.valid),
            p_value=message.p_value,
        )


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Measurements on labelled images before the search."""

    accuracy: Estimate
    # Among correctly classified images, the share whose unperturbed reconstruction is classified correctly, too.
    reconstruction_accuracy: Estimate
    label_model_accuracy: float
    # Comparison that decided on the rendering; None when the caller did.
    pilot: Pilot | None

    @classmethod
    def from_proto(cls, message: run_pb2.Preflight) -> Self:
        return cls(
            accuracy=Estimate.from_proto(message.accuracy),
            reconstruction_accuracy=Estimate.from_proto(message.reconstruction_accuracy),
            label_model_accuracy=message.label_model_accuracy,
            pilot=Pilot.from_proto(message.pilot) if message.HasField("pilot") else None,
        )


@dataclass(frozen=True, kw_only=True)
class GroupCounts:
    """Counts of the groups of failures, and of rejected groups."""

    # Failures in the mixture: those from sources that correction may use.
    failures: int
    failures_without_region: int
    groups: int
    # Groups whose failures have too few sources.
    below_support: int
    # Groups merged into another one.
    merged: int
    # Groups whose fresh images are no worse than their controls.
    not_worse_than_control: int

    @classmethod
    def from_proto(cls, message: region_pb2.GroupCounts) -> Self:
        return cls(**same_fields(cls, message))


@dataclass(frozen=True, kw_only=True)
class ValidityAdvice:
    """Validity thresholds derived from the annotations of a run.

    Every region has the same weight, whatever its size.
    """

    # Thresholds by the names in `RunSettings.validity`; none is looser than that of the run.
    validity: Mapping[str, float]
    # Rejected shares of the failures of invalid regions, and of labelled ones (at most 0.1).
    invalid_rejected: float
    valid_rejected: float
    invalid_regions: int
    valid_regions: int

    @classmethod
    def from_proto(cls, message: run_pb2.ValidityAdvice) -> Self:
        return cls(
            validity={field.name: value for field, value in message.validity.ListFields()},
            invalid_rejected=message.invalid_rejected,
            valid_rejected=message.valid_rejected,
            invalid_regions=message.invalid_regions,
            valid_regions=message.valid_regions,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A search for failures and its regions.

    `state` is preparing, identifying, distilling, succeeded, failed or cancelled.
    """

    id: str
    state: str
    model: str
    model_version: int
    dataset: str
    seed: int
    # Finished share of the current stage, in [0, 1].
    progress: float
    note: str
    error: str
    # Machine-readable reason of the error, for instance VAE_TOO_COARSE.
    error_reason: str
    # None during the preparation.
    preflight: Preflight | None
    counts: SearchCounts
    region_count: int
    # None until the distillation is finished.
    groups: GroupCounts | None
    config: Mapping[str, Any]
    # How latents become images: "decoder" or "residual"; "auto" until the pilot has chosen.
    rendering: str
    # Input of the label model: "latent" or "image"; "auto" until the rendering is known.
    label_model: str
    # Id of the run whose annotations advised the omitted validity thresholds; empty for none.
    validity_from: str
    # Operation name, for `Client.operation`.
    operation: str
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Self:
        config = message.config
        return cls(
            id=names.last(message.name),
            state=enum_word(run_pb2.Run.State.Name(message.state), "STATE"),
            model=names.last(config.model),
            model_version=config.model_version,
            dataset=names.last(config.dataset),
            seed=config.seed,
            progress=message.progress,
            note=message.note,
            error=message.error,
            error_reason=message.error_reason,
            preflight=Preflight.from_proto(message.preflight) if message.HasField("preflight") else None,
            counts=SearchCounts.from_proto(message.counts),
            region_count=message.region_count,
            groups=GroupCounts.from_proto(message.groups) if message.HasField("groups") else None,
            config={section: message_fields(getattr(config, section)) for section in SECTIONS},
            rendering=enum_word(run_pb2.SearchConfig.Rendering.Name(config.search.rendering), "RENDERING"),
            label_model=enum_word(run_pb2.ValidityConfig.LabelModel.Name(config.validity.label_model), "LABEL_MODEL"),
            validity_from=names.last(config.validity_from),
            operation=message.operation,
            create_time=to_datetime(message.create_time),
            update_time=to_datetime(message.update_time),
        )

    @property
    def ended(self) -> bool:
        """Return whether the run is finished."""
        return self.state in {"succeeded", "failed", "cancelled"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A misclassified rendered perturbation.

    It is identified by run, source, round and draw.
    """

    # Index of the source image in the searched split.
    source: int
    round: int
    draw: int
    # Class indices.
    true_label: int
    predicted_label: int
    # Logit of the true class minus the largest other logit; negative.
    margin: float
    # Perturbation radius, in aggregate latent standard deviations.
    radius_sd: float
    # Evidence that the image still shows its true label; higher is better, except for the round trip.
    typicality: float
    label_probability: float
    neighbour_agreement: float
    round_trip_sd: float
    oracle_margin: float
    # (d,)
    latent: npt.NDArray[np.float32]
    model_version: int
    # Excluded from correction, for figures before and after it.
    held_out: bool

    @classmethod
    def from_proto(cls, message: failure_pb2.Failure) -> Self:
        return cls(**same_fields(cls, message) | {"latent": np.array(message.latent, np.float32)})


@dataclass(frozen=True, kw_only=True)
class FailureBatch:
    """A batch of failures, with the token that resumes after it."""

    failures: tuple[Failure, ...]
    resume_token: str

    @classmethod
    def from_proto(cls, message: generator_service_pb2.IdentifyResponse) -> Self:
        return cls(
            failures=tuple(Failure.from_proto(failure) for failure in message.failures),
            resume_token=message.resume_token,
        )


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """The estimated cost of a run with one generator."""

    sources: int
    # Largest number of decoded perturbations.
    decodes: int
    decodes_per_s: float
    # 0 for an already trained VAE.
    training_s: float
    search_s: float

    @classmethod
    def from_proto(cls, message: run_pb2.CostEstimate) -> Self:
        return cls(**same_fields(cls, message))
