"""Failures as they are found, and what a run would cost."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from defuse.v1 import failure_pb2, generator_service_pb2, run_pb2


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A decoded perturbation that the classifier gets wrong. It *is* (run, source, round, draw)."""

    # Position of the source image in the searched split.
    source: int
    round: int
    draw: int
    # Class ids.
    true_label: int
    predicted_label: int
    # Logit of the true class minus the largest other one, negative.
    margin: float
    # Size of the step in aggregate latent standard deviations.
    radius_sd: float
    # What speaks for its still being a picture of its true label; higher is better but for the round trip.
    typicality: float
    label_probability: float
    neighbour_agreement: float
    round_trip_sd: float
    oracle_margin: float
    # (d,)
    latent: npt.NDArray[np.float32]
    model_version: int
    # Kept out of correction, for before/after figures.
    held_out: bool

    @classmethod
    def from_proto(cls, message: failure_pb2.Failure) -> Self:
        values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(cls)}
        return cls(**values | {"latent": np.array(message.latent, np.float32)})


@dataclass(frozen=True, kw_only=True)
class FailureBatch:
    """The next failures of a run, and where to go on from."""

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
    """What a run would cost with one generator of the kind that answered."""

    sources: int
    # Perturbations that would be decoded, at most.
    decodes: int
    decodes_per_s: float
    # 0 where the VAE is trained already.
    training_s: float
    search_s: float

    @classmethod
    def from_proto(cls, message: run_pb2.CostEstimate) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})
