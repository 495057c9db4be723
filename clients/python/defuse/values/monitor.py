"""Monitors of production traffic, alerts, and audit events."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import access_pb2, audit_pb2, monitor_pb2
from defuse.values.primitives import Estimate, enum_word, to_datetime


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The configuration of a model's monitor."""

    # Observations between two false alarms, in expectation, at least.
    expected_run_length: float
    # How long observations are stored.
    retention_s: float
    # Content stored after the evaluation of an image: images (with their latents) or latents.
    keep: str
    webhook_url: str
    # Whether an alert about a region starts a run on the captured images that caused it.
    start_runs: bool

    @classmethod
    def from_proto(cls, message: monitor_pb2.MonitorConfig) -> Self:
        return cls(
            expected_run_length=message.expected_run_length,
            retention_s=message.retention.ToTimedelta().total_seconds(),
            keep=enum_word(monitor_pb2.MonitorConfig.Keep.Name(message.keep), "KEEP"),
            webhook_url=message.webhook_url,
            start_runs=message.start_runs,
        )


@dataclass(frozen=True, kw_only=True)
class RegionHits:
    """The number of observed images inside a region."""

    run: str
    region: str
    label: str
    hits: int
    # Share of the reference images inside the region. The contract and JSON output say `calm_rate`.
    reference_rate: Estimate = field(metadata={"json": "calm_rate"})
    # Hits by model version.
    versions: Mapping[str, int]

    @classmethod
    def from_proto(cls, message: monitor_pb2.RegionHits) -> Self:
        return cls(
            run=names.last(names.parent(message.region)),
            region=names.last(message.region),
            label=message.label,
            hits=message.hits,
            reference_rate=Estimate.from_proto(message.calm_rate),
            versions=dict(message.versions),
        )


@dataclass(frozen=True, kw_only=True)
class MonitorState:
    """The state of a model's monitor since its last reset."""

    model: str
    config: MonitorConfig
    # Id of the guard that finds region hits; empty for a model without guards.
    guard: str
    observations: int
    hits: tuple[RegionHits, ...]
    # Total variation distance of the predicted classes to the reference split, in [0, 1].
    prediction_drift: float
    # In [-1, 1], negative for images less typical than the reference split.
    latent_drift: float
    # Estimated without ground truth; None without scores.
    estimated_accuracy: float | None
    # Stored observations with ground truth, and the correctly classified ones among them.
    truths: int
    right: int
    # Observations by model version.
    versions: Mapping[str, int]
    # None before the first evaluation.
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
            update_time=to_datetime(message.update_time) if message.HasField("update_time") else None,
        )

    @property
    def real_accuracy(self) -> float | None:
        """Return the accuracy on observations with ground truth, None without any."""
        return self.right / self.truths if self.truths else None


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A detected change. `kind` is region_hits, prediction_drift or latent_drift."""

    id: str
    model: str
    kind: str
    # `runs/{run}/regions/{region}` for region_hits, a class name for prediction_drift.
    subject: str
    summary: str
    # At least the expected run length.
    evidence: float
    # Since the last reset of the monitor.
    observations: int
    # Share among the reference images, and since the estimated time of the change, for kinds with a share. The
    # contract and JSON output say `calm`.
    reference_rate: float = field(metadata={"json": "calm"})
    now: float
    # Id of the run that the alert started; empty for none.
    run: str
    create_time: datetime
    # Estimated time of the change.
    since: datetime

    @classmethod
    def from_proto(cls, message: monitor_pb2.Alert) -> Self:
        return cls(
            id=names.last(message.name),
            model=names.last(names.parent(message.name)),
            kind=enum_word(monitor_pb2.Alert.Kind.Name(message.kind), "KIND"),
            subject=message.subject,
            summary=message.summary,
            evidence=message.evidence,
            observations=message.observations,
            reference_rate=message.calm,
            now=message.now,
            run=names.last(message.run),
            create_time=to_datetime(message.create_time),
            since=to_datetime(message.since),
        )


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """A call that changed something or tried to.

    `caller` and `role` are empty for gateways without tokens.
    """

    time: datetime
    caller: str
    role: str
    # The called method, and the resource names in the request.
    method: str
    resources: tuple[str, ...]
    # `OK`, or a gRPC status code and the reason of the error.
    code: str
    reason: str
    # Network address of the caller.
    peer: str
    # OpenTelemetry trace id; empty without tracing.
    trace_id: str

    @classmethod
    def from_proto(cls, message: audit_pb2.AuditEvent) -> Self:
        return cls(
            time=to_datetime(message.time),
            caller=message.caller,
            role=enum_word(access_pb2.Role.Name(message.role), "ROLE") if message.role else "",
            method=message.method,
            resources=tuple(message.resources),
            code=message.code,
            reason=message.reason,
            peer=message.peer,
            trace_id=message.trace_id,
        )
