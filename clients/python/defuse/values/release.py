"""Releases, trials of candidates, and long-running operations."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from google.rpc import error_details_pb2

from defuse import names
from defuse.v1 import correction_pb2, operation_pb2, release_pb2, run_pb2, trial_pb2
from defuse.values.correction import Correction
from defuse.values.primitives import enum_word, same_fields, to_datetime
from defuse.values.run import Run


@dataclass(frozen=True, kw_only=True)
class Release:
    """A change of a model's released version.

    `kind` is registered, released or rolled_back. `verdict` is the id of the gate's
    verdict, and `approver` the person who released a candidate that failed the gate.
    """

    model: str
    kind: str
    version: int
    previous_version: int
    correction: str
    verdict: str
    actor: str
    reason: str
    approver: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: release_pb2.Release) -> Self:
        return cls(
            model=names.last(message.model),
            kind=enum_word(release_pb2.Release.Kind.Name(message.kind), "KIND"),
            version=message.version,
            previous_version=message.previous_version,
            correction=message.correction,
            verdict=names.last(message.verdict),
            actor=message.actor,
            reason=message.reason,
            approver=message.approver,
            create_time=to_datetime(message.create_time),
        )


@dataclass(frozen=True, kw_only=True)
class TrialCounts:
    """Requests, compared images and mean latencies of a trial.

    The champion responds to the requests counted in `challenger_errors`. `dropped`
    requests were sampled, but not compared. Latencies are in milliseconds.
    """

    champion_requests: int
    challenger_requests: int
    challenger_errors: int
    compared: int
    agreed: int
    dropped: int
    champion_ms: float
    challenger_ms: float

    @classmethod
    def from_proto(cls, message: trial_pb2.TrialCounts) -> Self:
        return cls(**same_fields(cls, message))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial of a candidate on live requests, beside the released version.

    `mode` is canary or shadow, and `state` is running or ended.
    """

    id: str
    model: str
    correction: str
    mode: str
    # Share of the requests through the gateway without a version, in (0, 1].
    share: float
    state: str
    # Name and version in Triton.
    candidate: str
    candidate_version: int
    actor: str
    reason: str
    approver: str
    counts: TrialCounts
    create_time: datetime
    end_time: datetime | None

    @classmethod
    def from_proto(cls, message: trial_pb2.Trial) -> Self:
        return cls(
            id=names.last(message.name),
            model=names.last(names.parent(message.name)),
            correction=message.correction,
            mode=enum_word(trial_pb2.Trial.Mode.Name(message.mode), "MODE"),
            share=message.share,
            state=enum_word(trial_pb2.Trial.State.Name(message.state), "STATE"),
            candidate=message.candidate,
            candidate_version=message.candidate_version,
            actor=message.actor,
            reason=message.reason,
            approver=message.approver,
            counts=TrialCounts.from_proto(message.counts),
            create_time=to_datetime(message.create_time),
            end_time=to_datetime(message.end_time) if message.HasField("end_time") else None,
        )


@dataclass(frozen=True, kw_only=True)
class OperationStatus:
    """The status of a search, a correction or a release.

    `verb` is search, correct or release. `state` is running, succeeded, failed or
    cancelled.
    """

    # `runs/{run}/operations/{operation}`, or `models/{model}/operations/{operation}`
    name: str
    verb: str
    state: str
    # Finished share of the current stage of a search, or of the whole correction.
    progress: float
    note: str
    error: str
    # Machine-readable reason of the error, for instance VAE_TOO_COARSE.
    error_reason: str
    # None until the operation succeeds.
    result: Run | Correction | Release | None
    create_time: datetime
    update_time: datetime

    @classmethod
    def from_proto(cls, message: Any) -> Self:
        """Return the status in a google.longrunning.Operation."""
        metadata = operation_pb2.OperationMetadata()
        message.metadata.Unpack(metadata)
        return cls(
            name=message.name,
            verb=metadata.verb,
            state=enum_word(operation_pb2.OperationMetadata.State.Name(metadata.state), "STATE"),
            progress=metadata.progress,
            note=metadata.note,
            error=message.error.message,
            error_reason=_error_reason(message),
            result=_result(message) if message.HasField("response") else None,
            create_time=to_datetime(metadata.create_time),
            update_time=to_datetime(metadata.update_time),
        )

    @property
    def parent(self) -> str:
        """Return the resource name of the run or model.

        It is `runs/{run}` or `models/{model}`.
        """
        return names.parent(self.name)

    @property
    def ended(self) -> bool:
        """Return whether the operation is finished."""
        return self.state != "running"


def _result(message: Any) -> Run | Correction | Release:
    run, correction, release = run_pb2.Run(), correction_pb2.Correction(), release_pb2.Release()
    if message.response.Unpack(run):
        return Run.from_proto(run)
    if message.response.Unpack(correction):
        return Correction.from_proto(correction)
    message.response.Unpack(release)
    return Release.from_proto(release)


def _error_reason(message: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in message.error.details:
        detail.Unpack(info)
    return str(info.reason)
