"""What callers changed."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from defuse.v1 import access_pb2, audit_pb2
from defuse.values.plain import moment, word


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """A call that changed something, or was to. `caller` and `role` are empty where callers show no tokens."""

    time: datetime
    caller: str
    role: str
    # What was called, and the names of resources in the request.
    method: str
    resources: tuple[str, ...]
    # How it ended: `OK`, or a status of gRPC and the reason of the error.
    code: str
    reason: str
    # Where it came from.
    peer: str
    # Of OpenTelemetry; empty where no traces are made.
    trace_id: str

    @classmethod
    def from_proto(cls, message: audit_pb2.AuditEvent) -> Self:
        return cls(
            time=moment(message.time),
            caller=message.caller,
            role=word(access_pb2.Role.Name(message.role), "ROLE") if message.role else "",
            method=message.method,
            resources=tuple(message.resources),
            code=message.code,
            reason=message.reason,
            peer=message.peer,
            trace_id=message.trace_id,
        )
