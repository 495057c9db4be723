"""Errors to gRPC statuses and back.

`tests/unit/runtime/test_interceptors.py` sends them over a real connection.
"""

import inspect
from collections.abc import Sequence

import grpc
import pytest
from defuse import errors
from defuse.errors import (
    CODES,
    Conflict,
    DefuseError,
    Internal,
    InvalidInput,
    LimitExceeded,
    NotFound,
    StoreFull,
    Unavailable,
    from_rpc_error,
    to_status,
)
from google.rpc import error_details_pb2, status_pb2

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DefuseError)]


class Status(grpc.RpcError):
    """An error of gRPC: a code, details and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, bytes]] = ()) -> None:
        super().__init__()
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Sequence[tuple[str, bytes]]:
        return self._metadata


def sent(status: status_pb2.Status) -> Status:
    """Return the error of gRPC that a caller receives for a status."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return Status(code, status.message, [("grpc-status-details-bin", status.SerializeToString())])


def test_table_is_complete() -> None:
    """Each class but the base has a code.

    Classes that share one have different reasons.
    """
    assert set(CLASSES) - {DefuseError} == set(CODES)
    assert len({(code, cls.default_reason) for cls, code in CODES.items()}) == len(CODES)
    assert [cls for cls in CODES if list(CODES.values()).count(CODES[cls]) > 1] == [StoreFull, LimitExceeded]


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type[DefuseError]) -> None:
    """A class is read back with message, reason and metadata."""
    reason = cls.default_reason if cls is LimitExceeded else "PLANTED"
    error = cls("region 'r9' is not there", reason=reason, metadata={"region": "r9"})
    status = to_status(error)
    assert status.code == CODES[cls].value[0]
    read = from_rpc_error(sent(status), address="here:1")
    assert type(read) is cls
    assert (read.message, read.reason, read.metadata) == (error.message, reason, {"region": "r9"})
    assert str(read) == error.message


@pytest.mark.parametrize("cls", [InvalidInput, NotFound])
def test_field(cls: type[DefuseError]) -> None:
    """The field travels as google.rpc.BadRequest."""
    status = to_status(cls("the radius is 9; at most 3", field="config.search.radius_sd"))
    violations = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(violations)
    [violation] = violations.field_violations
    assert (violation.field, violation.description) == ("config.search.radius_sd", "the radius is 9; at most 3")
    assert from_rpc_error(sent(status), address="here:1").field == "config.search.radius_sd"


@pytest.mark.parametrize("seconds", [0.0, 0.25, 90.0])
def test_retry_delay(seconds: float) -> None:
    """The delay travels as google.rpc.RetryInfo."""
    status = to_status(LimitExceeded("too many calls", retry_after_s=seconds))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == seconds * 1e9
    assert from_rpc_error(sent(status), address="here:1").retry_after_s == seconds


def test_default_retry_delays() -> None:
    """Only errors that a retry may resolve have a delay by default."""
    again = {cls for cls in CODES if cls("x").retry_after_s is not None}
    assert again == {Conflict, Unavailable, LimitExceeded}
    for cls in CODES:
        read = from_rpc_error(sent(to_status(cls("x"))), address="here:1")
        assert (read.retry_after_s, read.field) == (cls("x").retry_after_s, None)


def test_classes_with_one_code() -> None:
    """They share a status code; an unknown reason is read as StoreFull."""
    for cls in (StoreFull, LimitExceeded):
        assert type(from_rpc_error(sent(to_status(cls("x"))), address="here:1")) is cls
    assert type(from_rpc_error(sent(to_status(StoreFull("x", reason="NEWER"))), address="here:1")) is StoreFull


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_default_reasons(cls: type[DefuseError]) -> None:
    """Each class has its own default reason."""
    assert cls("x").reason == cls.default_reason
    assert sum(other.default_reason == cls.default_reason for other in CODES) == 1


def test_domain() -> None:
    """The reason travels as google.rpc.ErrorInfo of the domain `defuse`."""
    info = error_details_pb2.ErrorInfo()
    assert to_status(StoreFull("full")).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("defuse", "STORE_FULL")


def test_absent_server() -> None:
    """Unavailable names the address, and the command that starts a stack."""
    read = from_rpc_error(Status(grpc.StatusCode.UNAVAILABLE, "connection refused"), address="here:1")
    assert type(read) is Unavailable
    assert "here:1" in read.message
    assert "defuse up" in read.message


@pytest.mark.parametrize(
    ("details", "cls"),
    [
        ("CANCELLED", Unavailable),
        ("Received RST_STREAM with error code 8", Unavailable),
        ("Locally cancelled by application!", errors.Cancelled),
        ("Channel closed!", errors.Cancelled),
    ],
)
def test_cancelled_calls(details: str, cls: type[DefuseError]) -> None:
    """Stopping servers cancel new calls without a reason; callers cancel locally."""
    assert type(from_rpc_error(Status(grpc.StatusCode.CANCELLED, details), address="here:1")) is cls


def test_unavailable_from_a_server() -> None:
    """The server's message and reason are kept."""
    read = from_rpc_error(sent(to_status(Unavailable("Triton is starting", reason="TRITON"))), address="here:1")
    assert (read.message, read.reason) == ("Triton is starting", "TRITON")


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, Internal),
        (grpc.StatusCode.UNKNOWN, Internal),
    ],
)
def test_status_without_details(code: grpc.StatusCode, cls: type[DefuseError]) -> None:
    """Errors of gRPC itself are read by code; unexpected codes are Internal."""
    read = from_rpc_error(Status(code, "said by gRPC"), address="here:1")
    assert (type(read), read.message, read.reason) == (cls, "said by gRPC", cls.default_reason)
    assert from_rpc_error(Status(code, ""), address="here:1").message == code.name


def test_too_large_message() -> None:
    """RESOURCE_EXHAUSTED of gRPC itself, for large messages, is not StoreFull."""
    details = "Received message larger than max (9000000 vs. 8388608)"
    read = from_rpc_error(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, details), address="here:1")
    assert not isinstance(read, StoreFull)
    assert details in read.message
