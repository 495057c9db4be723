"""The failures and counts of a search, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from services.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Failures:
    """The m misclassified perturbations, as arrays; `Failure` in the contract."""

    source: Array
    round: Array
    draw: Array
    true_label: Array
    predicted_label: Array
    # Logit of the true class minus the largest other one, negative.
    margin: Array
    # norm((z - mu) / sd_agg) / sqrt(d)
    radius_sd: Array
    typicality: Array
    label_probability: Array
    neighbour_agreement: Array
    round_trip_sd: Array
    oracle_margin: Array
    # (m, d)
    latent: Array
    held_out: Array

    @classmethod
    def of(cls, **arrays: Array) -> "Failures":
        """Return failures of arrays over m of them, in their stored types.

        Missing fields are 0.
        """
        count = len(arrays["source"])
        given = {name: arrays.get(name, np.zeros(count)) for name in _TYPES}
        return cls(latent=arrays["latent"], **{name: array.astype(_TYPES[name]) for name, array in given.items()})

    @classmethod
    def none(cls, latent_dim: int) -> "Failures":
        return cls.of(source=np.zeros(0), latent=np.zeros((0, latent_dim), np.float32))

    @classmethod
    def joined(cls, parts: "Sequence[Failures]") -> "Failures":
        """Return the failures of several parts as one."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, keep: Array | slice) -> "Failures":
        """Return the failures that a mask, an index or a slice selects."""
        return Failures(**{name: array[keep] for name, array in self.arrays().items()})

    def with_signals(self, **values: Array) -> "Failures":
        """Return the same failures with measured signals, (m,) each."""
        return replace(self, **{name: value.astype(_TYPES[name]) for name, value in values.items()})


_TYPES: dict[str, type] = {
    "source": np.int64,
    "round": np.int32,
    "draw": np.int32,
    "true_label": np.int32,
    "predicted_label": np.int32,
    "margin": np.float32,
    "radius_sd": np.float32,
    "typicality": np.float32,
    "label_probability": np.float32,
    "neighbour_agreement": np.float32,
    "round_trip_sd": np.float32,
    "oracle_margin": np.float32,
    "held_out": np.uint8,
}
# The counter of each failed check, by the field that records its signal.
_REASONS = {
    "radius_sd": "rejected_by_radius",
    "typicality": "rejected_by_typicality",
    "label_probability": "rejected_by_label_model",
    "neighbour_agreement": "rejected_by_neighbours",
    "round_trip_sd": "rejected_by_round_trip",
    "oracle_margin": "rejected_by_oracle",
    "confirmation": "rejected_by_confirmation",
}


@dataclass(kw_only=True)
class SearchCounters:
    """Counts of tried and rejected perturbations; `SearchCounts` in the contract."""

    sources: int = 0
    sources_wrong_on_image: int = 0
    sources_wrong_on_reconstruction: int = 0
    decodes: int = 0
    candidates: int = 0
    screened_out: int = 0
    rejected_by_radius: int = 0
    rejected_by_typicality: int = 0
    rejected_by_label_model: int = 0
    rejected_by_neighbours: int = 0
    rejected_by_round_trip: int = 0
    rejected_by_oracle: int = 0
    rejected_by_confirmation: int = 0
    rejected_by_source_limit: int = 0
    failures: int = 0
    # Decodes of reconstructions and confirmations; `decodes` counts perturbations.
    decodes_again: int = 0
    encodes: int = 0
    classifications: int = 0

    def reject(self, reason: str, count: int) -> None:
        """Count candidates that a check rejected."""
        name = _REASONS[reason]
        setattr(self, name, getattr(self, name) + count)
