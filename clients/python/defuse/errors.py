"""Errors of the services and the client, with their gRPC status codes.

    DefuseError
    ├── InvalidInput        change the request
    ├── NotFound            the named resource does not exist
    ├── AlreadyExists       the name is taken
    ├── NotReady            another step is missing
    ├── Conflict            wait for work in progress
    ├── Unauthenticated     send a known token
    ├── PermissionDenied    the caller's role does not allow the call
    ├── Cancelled           the work was cancelled
    ├── Unavailable         a server is unavailable; retry
    ├── StoreFull           the artifact store is full; retry after cleaning up
    ├── LimitExceeded       send fewer requests, or fewer at a time
    ├── DeadlineExceeded    the deadline passed before the response
    └── Internal            a defect of Defuse

Every message names the wrong value and the remedy. `reason` is machine-readable (`REGION_NOT_FOUND`), `field` is the
path of the wrong field of a request, and `retry_after_s` is the delay after which a retry may succeed. They are sent as
google.rpc.ErrorInfo, BadRequest and RetryInfo. `CODES` maps classes to status codes: servers read it in one direction,
clients in the other.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "defuse"


class DefuseError(Exception):
    """Base class of all errors of Defuse."""

    default_reason: ClassVar[str] = "INTERNAL"
    # None: a retry does not help by itself.
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
        # Path of the wrong field of the request, for instance `config.search.radius_sd`.
        self.field = field
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s


class InvalidInput(DefuseError):
    """The request is invalid; change it."""

    default_reason = "INVALID_INPUT"


class NotFound(DefuseError):
    """The named resource does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(DefuseError):
    """The name is taken."""

    default_reason = "ALREADY_EXISTS"


class NotReady(DefuseError):
    """Another step is missing; the message names it."""

    default_reason = "NOT_READY"


class Conflict(DefuseError):
    """Work in progress blocks the call; wait for it."""

    default_reason = "CONFLICT"
    default_retry_after_s = 5.0


class Unauthenticated(DefuseError):
    """The call has no known token."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(DefuseError):
    """The role of the caller does not allow the call."""

    default_reason = "PERMISSION_DENIED"


class Cancelled(DefuseError):
    """The work was cancelled."""

    default_reason = "CANCELLED"


class Unavailable(DefuseError):
    """A server is unavailable; retry."""

    default_reason = "UNAVAILABLE"
    default_retry_after_s = 1.0


class StoreFull(DefuseError):
    """The artifact store is full; retry after the operator made room."""

    default_reason = "STORE_FULL"


class LimitExceeded(DefuseError):
    """Too many requests, or too many at a time."""

    default_reason = "LIMIT_EXCEEDED"
    default_retry_after_s = 1.0


class DeadlineExceeded(DefuseError):
    """The deadline passed before the response."""

    default_reason = "DEADLINE_EXCEEDED"


class Internal(DefuseError):
    """A defect of Defuse."""


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
# Classes that share a code are told apart by their default reasons; other reasons map to the first class.
_CLASSES = {code: cls for cls, code in reversed(CODES.items())}
_BY_REASON = {(code, cls.default_reason): cls for cls, code in CODES.items()}
_MAX_TEXT_BYTES = 600
# Prefixes of gRPC's details for calls that this side cancelled.
_CANCELLED_LOCALLY = ("Locally cancelled", "Channel ")


def to_status(error: DefuseError) -> status_pb2.Status:
    """Return the google.rpc.Status of an error."""
    known = next((cls for cls in type(error).__mro__ if cls in CODES), Internal)
    code, _ = CODES[known].value
    # The status travels in headers of at most 8 KiB, and messages of other servers may be long.
    status = status_pb2.Status(code=code, message=_truncate(error.message))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: DefuseError) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.field:
        yield error_details_pb2.BadRequest(
            field_violations=[{"field": error.field, "description": _truncate(error.message)}]
        )
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        yield retry


def _truncate(text: str) -> str:
    """Truncate a text for the headers.

    The text is sent up to three times, once percent-encoded: nine bytes for a character of three.
    """
    return text.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")


def from_rpc_error(error: grpc.RpcError, *, address: str) -> DefuseError:
    """Return the error of a failed gRPC call to an address."""
    code, details = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    if not status and _is_absent(code, details):
        return Unavailable(f"nothing answers at {address} ({details}); is the stack up? `defuse up` starts one")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not status:  # by gRPC itself, for too large messages
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


def _is_absent(code: grpc.StatusCode, details: str) -> bool:
    """Return whether gRPC itself reports an absent or stopping server."""
    if code is grpc.StatusCode.CANCELLED:  # stopping servers cancel new calls
        return not details.startswith(_CANCELLED_LOCALLY)
    return code is grpc.StatusCode.UNAVAILABLE


def _detail(status: status_pb2.Status | None, kind: Any) -> Any:
    """Return a status's detail of a kind, empty if it has none."""
    for detail in status.details if status else ():
        if detail.Unpack(kind):
            break
    return kind
