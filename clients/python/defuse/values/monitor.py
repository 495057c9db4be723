"""What is known of a model's traffic, and what has changed in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import monitor_pb2
from defuse.values.estimate import Estimate
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How a model's traffic is watched."""

    # Observations between two false alarms while nothing changes, at least, in expectation.
    expected_run_length: float
    # How long observations are kept.
    retention_s: float
    # What is kept of an image once it was looked at: images (with their latents) or latents.
    keep: str
    webhook_url: str
    # Whether an alert about a region starts a run on the captured images that caused it.
    start_runs: bool

    @classmethod
    def from_proto(cls, message: monitor_pb2.MonitorConfig) -> Self:
        return cls(
            expected_run_length=message.expected_run_length,
            retention_s=message.retention.ToTimedelta().total_seconds(),
            keep=word(monitor_pb2.MonitorConfig.Keep.Name(message.keep), "KEEP"),
            webhook_url=message.webhook_url,
            start_runs=message.start_runs,
        )


@dataclass(frozen=True, kw_only=True)
class RegionHits:
    """How often images fall in a region; `calm_rate` is the share of the reference images inside."""

    run: str
    region: str
    label: str
    hits: int
    calm_rate: Estimate
    # Hits by the version that answered.
    versions: Mapping[str, int]

    @classmethod
    def from_proto(cls, message: monitor_pb2.RegionHits) -> Self:
        return cls(
            run=names.last(names.parent(message.region)),
            region=names.last(message.region),
            label=message.label,
            hits=message.hits,
            calm_rate=Estimate.from_proto(message.calm_rate),
            versions=dict(message.versions),
        )


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What is known of a model's traffic since its monitor began anew."""

    model: str
    config: MonitorConfig
    # Id of the guard whose regions images are looked for in; empty where the model has none.
    guard: str
    observations: int
    hits: tuple[RegionHits, ...]
    # Total variation distance to the reference split, in [0, 1].
    prediction_drift: float
    # In [-1, 1], negative where images are less usual.
    latent_drift: float
    # As told without ground truth; None without scores.
    estimated_accuracy: float | None
    # Observations that are kept whose ground truth came, and those of them that were read correctly.
    truths: int
    right: int
    # Observations by the version that answered.
    versions: Mapping[str, int]
    # None where nothing was looked at yet.
    update_time: datetime | None

    @classmethod
    def from_proto(cls, message: monitor_pb2.Monitor) -> Self:
        return cls(
            model=names.last(message.name.removesuffix("/monitor")),
            config=MonitorConfig.from_proto(message.config),
            guard=names.last(message.guard),
            observations=message.observations,
            hits=tuple(map(RegionHits.from_proto, message.hits)),
            prediction_drift=message.prediction_drift,
            latent_drift=message.latent_drift,
            estimated_accuracy=message.estimated_accuracy if message.HasField("estimated_accuracy") else None,
            truths=message.truths,
            right=message.right,
            versions=dict(message.versions),
            update_time=moment(message.update_time) if message.HasField("update_time") else None,
        )

    @property
    def real_accuracy(self) -> float | None:
        """The accuracy where ground truth came; None where none did."""
        return self.right / self.truths if self.truths else None


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something has changed. `kind` is region_hits, prediction_drift or latent_drift."""

    id: str
    model: str
    kind: str
    # `runs/{run}/regions/{region}` at region_hits, a class name at prediction_drift.
    subject: str
    summary: str
    # At least the expected run length.
    evidence: float
    # Since the monitor began anew.
    observations: int
    # Share in calm, and since the change is thought to have begun, where the kind has one.
    calm: float
    now: float
    # Id of the run that it started; empty for none.
    run: str
    create_time: datetime
    # What was reported since then caused it.
    since: datetime

    @classmethod
    def from_proto(cls, message: monitor_pb2.Alert) -> Self:
        return cls(
            id=names.last(message.name),
            model=names.last(names.parent(message.name)),
            kind=word(monitor_pb2.Alert.Kind.Name(message.kind), "KIND"),
            subject=message.subject,
            summary=message.summary,
            evidence=message.evidence,
            observations=message.observations,
            calm=message.calm,
            now=message.now,
            run=names.last(message.run),
            create_time=moment(message.create_time),
            since=moment(message.since),
        )
