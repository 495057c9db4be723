"""The table of errors both ways; `tests/unit/runtime/test_interceptors.py` sends them over a real connection."""

import inspect
from collections.abc import Sequence

import grpc
import pytest
from defuse import errors
from defuse.errors import CODES, DefuseError, Internal, StoreFull, Unavailable, from_rpc_error, to_status
from google.rpc import error_details_pb2, status_pb2

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DefuseError)]


class Status(grpc.RpcError):
    """What a gRPC call raises: a code, a sentence and trailing metadata."""

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
    """Return what a caller sees of a status."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return Status(code, status.message, [("grpc-status-details-bin", status.SerializeToString())])


def test_every_class_is_in_the_table_once() -> None:
    """Each class of the hierarchy but its base has a code of its own."""
    assert set(CLASSES) - {DefuseError} == set(CODES)
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_both_ways(cls: type[DefuseError]) -> None:
    """A class becomes its code and is read back as itself, with sentence, reason and metadata."""
    error = cls("region 'r9' is not there", reason="PLANTED", metadata={"region": "r9"})
    status = to_status(error)
    assert status.code == CODES[cls].value[0]
    read = from_rpc_error(sent(status), address="here:1")
    assert type(read) is cls
    assert (read.message, read.reason, read.metadata) == (error.message, "PLANTED", {"region": "r9"})
    assert str(read) == error.message


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_a_class_has_a_reason_by_default(cls: type[DefuseError]) -> None:
    """An error that is given no reason has that of its class, and each class its own."""
    assert cls("x").reason == cls.default_reason
    assert sum(other.default_reason == cls.default_reason for other in CODES) == 1


def test_reason_is_for_programs_and_in_our_domain() -> None:
    """The reason travels as google.rpc.ErrorInfo of our domain, so that any client can read it."""
    info = error_details_pb2.ErrorInfo()
    assert to_status(StoreFull("full")).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("defuse", "STORE_FULL")


def test_nothing_answers() -> None:
    """A server that is not there is Unavailable, by its address, with the command that starts one."""
    read = from_rpc_error(Status(grpc.StatusCode.UNAVAILABLE, "connection refused"), address="here:1")
    assert type(read) is Unavailable
    assert "here:1" in read.message
    assert "defuse up" in read.message


def test_unavailable_that_a_server_said() -> None:
    """What a server itself says is unavailable keeps the server's words."""
    read = from_rpc_error(sent(to_status(Unavailable("Triton is starting", reason="TRITON"))), address="here:1")
    assert (read.message, read.reason) == ("Triton is starting", "TRITON")


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.UNIMPLEMENTED, Internal),
        (grpc.StatusCode.UNKNOWN, Internal),
    ],
)
def test_a_status_without_details(code: grpc.StatusCode, cls: type[DefuseError]) -> None:
    """What comes from gRPC itself is read by its code; a code that we never send is a defect."""
    read = from_rpc_error(Status(code, "said by gRPC"), address="here:1")
    assert (type(read), read.message, read.reason) == (cls, "said by gRPC", cls.default_reason)
    assert from_rpc_error(Status(code, ""), address="here:1").message == code.name


def test_a_message_too_large_for_grpc_is_no_full_store() -> None:
    """A server answers RESOURCE_EXHAUSTED for messages beyond its limit; nobody is sent to clear a disk for that."""
    details = "Received message larger than max (9000000 vs. 8388608)"
    read = from_rpc_error(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, details), address="here:1")
    assert not isinstance(read, StoreFull)
    assert details in read.message
