"""What can go wrong, on both sides of the wire.

    DefuseError
    ├── InvalidInput        the caller must change the request
    ├── NotFound            the caller named something that is not there
    ├── AlreadyExists       the caller named something that is taken
    ├── NotReady            the caller must do something else first
    ├── Conflict            the caller must wait for something under way
    ├── Unauthenticated     the caller must say who it is, with a token that is known
    ├── PermissionDenied    the caller may not do this; somebody else may
    ├── Cancelled           somebody asked for it
    ├── Unavailable         the operator must bring a server back; trying again is right
    ├── StoreFull           the operator must make room; trying again is right
    ├── DeadlineExceeded    the answer took longer than the caller allowed
    └── Internal            a defect of ours

Every error says what happened, with the value, and what to do. `reason` is for programs (`REGION_NOT_FOUND`).
The table at the end maps classes to gRPC status codes; servers read it one way, clients the other.
"""

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "defuse"


class DefuseError(Exception):
    """Base of all errors that Defuse raises."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})


class InvalidInput(DefuseError):
    """The caller must change the request."""

    default_reason = "INVALID_INPUT"


class NotFound(DefuseError):
    """The caller named something that is not there."""

    default_reason = "NOT_FOUND"


class AlreadyExists(DefuseError):
    """The caller named something that is taken."""

    default_reason = "ALREADY_EXISTS"


class NotReady(DefuseError):
    """The caller must do something else first."""

    default_reason = "NOT_READY"


class Conflict(DefuseError):
    """The caller must wait for something that is under way."""

    default_reason = "CONFLICT"


class Unauthenticated(DefuseError):
    """The caller must say who it is, with a token that is known."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(DefuseError):
    """The caller may not do this; somebody else may."""

    default_reason = "PERMISSION_DENIED"


class Cancelled(DefuseError):
    """Somebody asked for it to stop."""

    default_reason = "CANCELLED"


class Unavailable(DefuseError):
    """The operator must bring a server back; trying again is right."""

    default_reason = "UNAVAILABLE"


class StoreFull(DefuseError):
    """The operator must make room in the artifact store; trying again is right."""

    default_reason = "STORE_FULL"


class DeadlineExceeded(DefuseError):
    """The answer took longer than the caller allowed."""

    default_reason = "DEADLINE_EXCEEDED"


class Internal(DefuseError):
    """A defect of ours."""


CODES: dict[type[DefuseError], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    NotReady: grpc.StatusCode.FAILED_PRECONDITION,
    Conflict: grpc.StatusCode.ABORTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    StoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Internal: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code: cls for cls, code in CODES.items()}
_LONGEST_BYTES = 600


def to_status(error: DefuseError) -> status_pb2.Status:
    """Return the rich status that carries an error over the wire."""
    known = next((cls for cls in type(error).__mro__ if cls in CODES), Internal)
    code, _ = CODES[known].value
    # A status travels in the headers' 8 KiB: of another server's long words the first ones must do.
    status = status_pb2.Status(code=code, message=_cut(error.message))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    return status


def _cut(text: str) -> str:
    """Return the beginning of a text; it travels twice, once with up to nine bytes for a character of three."""
    return text.encode()[:_LONGEST_BYTES].decode(errors="ignore")


def from_rpc_error(error: grpc.RpcError, *, address: str) -> DefuseError:
    """Return the error that a server meant, or what its absence means."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and not (status := _rich_status(error)):
        return Unavailable(f"nothing answers at {address} ({details}); is the stack up? `defuse up` starts one")
    cls = _CLASSES.get(code, Internal)
    status = _rich_status(error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not status:  # gRPC's own: a message beyond its limit
        return InvalidInput(f"{details}; send less at once", reason="MESSAGE_TOO_LARGE")
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return cls(details, reason=info.reason, metadata=info.metadata)
    return cls(details or code_pb2.Code.Name(code.value[0]))


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    return rpc_status.from_call(error)
