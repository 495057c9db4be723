"""A candidate tried on live requests."""

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Self

from defuse import names
from defuse.v1 import trial_pb2
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class TrialCounts:
    """What a trial has seen: requests, images whose answers were compared, and mean times in milliseconds.

    `challenger_errors` are requests that the challenger failed to answer, whose callers got the champion's answer;
    `dropped` are those that were drawn, but not compared.
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
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate beside the version that callers get. `mode` is canary or shadow, `state` running or ended."""

    id: str
    model: str
    correction: str
    mode: str
    # Of the requests through the gateway that name no version, in (0, 1].
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
            mode=word(trial_pb2.Trial.Mode.Name(message.mode), "MODE"),
            share=message.share,
            state=word(trial_pb2.Trial.State.Name(message.state), "STATE"),
            candidate=message.candidate,
            candidate_version=message.candidate_version,
            actor=message.actor,
            reason=message.reason,
            approver=message.approver,
            counts=TrialCounts.from_proto(message.counts),
            create_time=moment(message.create_time),
            end_time=moment(message.end_time) if message.HasField("end_time") else None,
        )
