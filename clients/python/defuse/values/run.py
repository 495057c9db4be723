"""A run and what its search counted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Self

from defuse import names
from defuse.v1 import region_pb2, run_pb2
from defuse.values.estimate import Estimate
from defuse.values.plain import moment, settings, word

# Of a run's configuration, each a message of settings.
SECTIONS = ("search", "vae", "validity", "preflight", "mixture")


@dataclass(frozen=True, kw_only=True)
class SearchCounts:
    """What a search tried and found."""

    sources: int
    sources_wrong_on_image: int
    sources_wrong_on_reconstruction: int
    # Perturbations that were not decoded, since their latents are no longer their label.
    screened_out: int
    # Perturbations decoded and classified.
    decodes: int
    # Of these, the ones that the classifier got wrong.
    candidates: int
    # Candidates by the first check that they did not pass.
    rejected_by_radius: int
    rejected_by_label_model: int
    rejected_by_typicality: int
    rejected_by_neighbours: int
    rejected_by_round_trip: int
    rejected_by_oracle: int
    rejected_by_confirmation: int
    rejected_by_source_limit: int
    failures: int
    # What it took beside the perturbations.
    decodes_again: int
    encodes: int
    classifications: int

    @classmethod
    def from_proto(cls, message: run_pb2.SearchCounts) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was measured before the search, on labelled images."""

    accuracy: Estimate
    # Of the images read correctly, the share whose unperturbed reconstruction is read correctly too.
    reconstruction_accuracy: Estimate
    label_model_accuracy: float

    @classmethod
    def from_proto(cls, message: run_pb2.Preflight) -> Self:
        return cls(
            accuracy=Estimate.from_proto(message.accuracy),
            reconstruction_accuracy=Estimate.from_proto(message.reconstruction_accuracy),
            label_model_accuracy=message.label_model_accuracy,
        )


@dataclass(frozen=True, kw_only=True)
class GroupCounts:
    """How the failures of a run were grouped, and which groups are no regions."""

    # Failures that went into the mixture: those from sources that correction may use.
    failures: int
    failures_without_region: int
    groups: int
    # Groups left out because they have too few failures.
    below_support: int
    # Groups that were merged into another.
    merged: int
    # Groups left out because fresh decodes are no worse than reconstructions around them.
    not_worse_than_control: int

    @classmethod
    def from_proto(cls, message: region_pb2.GroupCounts) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class ValidityAdvice:
    """What the annotations of a run say of its validity thresholds; every region counts the same, whatever its size."""

    # Thresholds by the names of `RunSettings.validity`, none looser than those that the run had.
    validity: Mapping[str, float]
    # Share of the failures of invalid regions that they would have rejected, and of labelled ones, 0.1 at most.
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
    # The error for programs, for instance VAE_TOO_COARSE.
    error_reason: str
    # None while the run is prepared.
    preflight: Preflight | None
    counts: SearchCounts
    region_count: int
    # None until distillation is finished.
    groups: GroupCounts | None
    config: Mapping[str, Any]
    # The run whose annotations gave the validity thresholds that its creator left out; empty for none.
    validity_from: str
    # Name of the same as an operation: `Client.operation`.
    operation: str
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: run_pb2.Run) -> Self:
        config = message.config
        return cls(
            id=names.last(message.name),
            state=word(run_pb2.Run.State.Name(message.state), "STATE"),
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
            config={section: settings(getattr(config, section)) for section in SECTIONS},
            validity_from=names.last(config.validity_from),
            operation=message.operation,
            create_time=moment(message.create_time),
            update_time=moment(message.update_time),
        )

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        from defuse import notebook

        return notebook.of_run(self)
