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
    ├── LimitExceeded       the caller must ask less often, or less at the same time
    ├── DeadlineExceeded    the answer took longer than the caller allowed
    └── Internal            a defect of ours

Every error says what happened, with the value, and what to do. `reason` is for programs (`REGION_NOT_FOUND`), `field`
names what is wrong in a request, `retry_after_s` says when trying again may help: google.rpc.ErrorInfo, BadRequest and
RetryInfo. The table at the end maps classes to gRPC status codes; servers read it one way, clients the other.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "defuse"


class DefuseError(Exception):
    """Base of all errors that Defuse raises."""

    default_reason: ClassVar[str] = "INTERNAL"
    # Seconds after which a caller may try again, where that is right.
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        # Path of the field that is wrong in the request, for instance `config.search.radius_sd`.
        self.field = field
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s


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
    default_retry_after_s = 5.0


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
    default_retry_after_s = 1.0


class StoreFull(DefuseError):
    """The operator must make room in the artifact store; trying again is right."""

    default_reason = "STORE_FULL"


class LimitExceeded(DefuseError):
    """The caller must ask less often, or less at the same time."""

    default_reason = "LIMIT_EXCEEDED"
    default_retry_after_s = 1.0


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
    LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Internal: grpc.StatusCode.INTERNAL,
}
# Where classes share a code their own reasons tell which it is, and any other reason means the first.
_CLASSES = {code: cls for cls, code in reversed(CODES.items())}
_BY_REASON = {(code, cls.default_reason): cls for cls, code in CODES.items()}
_LONGEST_BYTES = 600
# How gRPC's words begin about a call that was cancelled on this side.
_HERE = ("Locally cancelled", "Channel ")


def to_status(error: DefuseError) -> status_pb2.Status:
    """Return the rich status that carries an error over the wire."""
    known = next((cls for cls in type(error).__mro__ if cls in CODES), Internal)
    code, _ = CODES[known].value
    # A status travels in the headers' 8 KiB: of another server's long words the first ones must do.
    status = status_pb2.Status(code=code, message=_cut(error.message))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: DefuseError) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.field:
        yield error_details_pb2.BadRequest(
            field_violations=[{"field": error.field, "description": _cut(error.message)}]
        )
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        yield retry


def _cut(text: str) -> str:
    """Return the beginning of a text; it travels up to three times, once with nine bytes for a character of three."""
    return text.encode()[:_LONGEST_BYTES].decode(errors="ignore")


def from_rpc_error(error: grpc.RpcError, *, address: str) -> DefuseError:
    """Return the error that a server meant, or what its absence means."""
    code, details = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    if not status and _is_absence(code, details):
        return Unavailable(f"nothing answers at {address} ({details}); is the stack up? `defuse up` starts one")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not status:  # gRPC's own: a message beyond its limit
        return InvalidInput(f"{details}; send less at once", reason="MESSAGE_TOO_LARGE")
    info = _detail(status, error_details_pb2.ErrorInfo())
    violations = _detail(status, error_details_pb2.BadRequest()).field_violations
    retry = _detail(status, error_details_pb2.RetryInfo())
    cls = _BY_REASON.get((code, info.reason)) or _CLASSES.get(code, Internal)
    return cls(
        details or code_pb2.Code.Name(code.value[0]),
        reason=info.reason,
        metadata=info.metadata,
        field=violations[0].field if violations else None,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def _is_absence(code: grpc.StatusCode, details: str) -> bool:
    """Say whether gRPC's own words mean that a server is away, or just going."""
    if code is grpc.StatusCode.CANCELLED:  # what reaches a server that stops; who asked for a cancellation said so
        return not details.startswith(_HERE)
    return code is grpc.StatusCode.UNAVAILABLE


def _detail(status: status_pb2.Status | None, kind: Any) -> Any:
    """Return the detail of a kind that a status has; the empty one where it has none."""
    for detail in status.details if status else ():
        if detail.Unpack(kind):
            break
    return kind
