"""Long-running operations through google.longrunning.Operations, over a real gateway."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from defuse.v1 import correction_pb2, operation_pb2, release_pb2, run_pb2, work_pb2
from defuse.v1 import gateway_service_pb2 as gateway_pb
from defuse.v1 import gateway_service_pb2_grpc as gateway_pb_grpc
from google.longrunning import operations_pb2_grpc
from google.longrunning import operations_proto_pb2 as pb
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from tests.conftest import eventually
from tests.gateway_process import Door, running_gateway

Run, Correction = run_pb2.Run, correction_pb2.Correction
FIRST = "runs/first/operations/search"
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def door(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), redis_server) as found:
        yield found


@pytest.fixture
def stub(door: Door, redis_url: str) -> Iterator[Any]:
    with grpc.insecure_channel(door.address) as channel:
        yield operations_pb2_grpc.OperationsStub(channel)


def run(name: str, *, created: int = 1000, state: "Run.State.ValueType" = Run.STATE_PREPARING) -> run_pb2.Run:
    return Run(name=f"runs/{name}", state=state, create_time={"seconds": created})


def correction(name: str, *, created: int = 1000) -> correction_pb2.Correction:
    return Correction(name=name, model="models/tiny", state=Correction.STATE_RUNNING, create_time={"seconds": created})


def listed(stub: Any, name: str = "", wanted: str = "", size: int = 0) -> list[str]:
    """Return the names of all operations, read page by page."""
    names, token = [], ""
    while True:
        request = pb.ListOperationsRequest(name=name, filter=wanted, page_size=size, page_token=token)
        answer = stub.ListOperations(request, timeout=TIMEOUT_S)
        assert not size or len(answer.operations) <= size
        names += [operation.name for operation in answer.operations]
        token = answer.next_page_token
        if not token:
            return names


def refusal(call: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    """Return code and reason with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT_S)
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(caught.value)
    assert status
    assert status.details[0].Unpack(info)
    return caught.value.code(), info.reason


def test_a_search_from_its_beginning_to_its_end(door: Door, stub: Any) -> None:
    """Its progress is typed, whoever waits is told of its end at once, and its response is the run."""
    door.plant(run("first"))
    progress = work_pb2.StageProgress(state=Run.STATE_PREPARING, progress=0.5, note="training the VAE")
    door.tell(work_pb2.Event(subject="runs/first", progress=progress))
    operation = stub.GetOperation(pb.GetOperationRequest(name=FIRST), timeout=TIMEOUT_S)
    metadata = operation_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (operation.done, metadata.progress, metadata.note) == (False, 0.5, "training the VAE")
    failed = work_pb2.StageFailed(error="mush", reason="VAE_TOO_COARSE")
    ending = threading.Timer(0.5, door.tell, [work_pb2.Event(subject="runs/first", failed=failed)])
    ending.start()
    ended = stub.WaitOperation(pb.WaitOperationRequest(name=FIRST), timeout=TIMEOUT_S)
    ending.join()
    assert (ended.done, ended.error.code, ended.error.message) == (True, code_pb2.FAILED_PRECONDITION, "mush")
    assert ended == stub.GetOperation(pb.GetOperationRequest(name=FIRST), timeout=TIMEOUT_S)


@pytest.mark.parametrize("bound", ["timeout", "deadline"])
def test_waiting_is_bounded(door: Door, stub: Any, bound: str) -> None:
    """By the timeout of the request and by the deadline of the call; the answer is the operation as it then is."""
    door.plant(run("first"))
    request = pb.WaitOperationRequest(name=FIRST, timeout=Duration(seconds=1) if bound == "timeout" else None)
    begin = time.monotonic()
    operation = answered(stub, request, timeout_s=TIMEOUT_S if bound == "timeout" else 4)
    assert not operation.done
    assert 0.5 < time.monotonic() - begin < TIMEOUT_S


def answered(stub: Any, request: pb.WaitOperationRequest, *, timeout_s: float) -> Any:
    """Wait for an operation; repeat the call where a busy machine missed the half second before the deadline."""
    for _ in range(5):
        try:
            return stub.WaitOperation(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:  # type: ignore[attr-defined]
                raise
    pytest.fail("no answer came before the deadline")


def test_cancelling_is_that_of_the_record(door: Door, stub: Any) -> None:
    """The operation of a run, or of a correction, is cancelled with it; once it has ended that changes nothing."""
    door.plant(run("first"), correction("runs/first/corrections/c1"))
    for name in (FIRST, "runs/first/operations/c1"):
        for _ in range(2):
            stub.CancelOperation(pb.CancelOperationRequest(name=name), timeout=TIMEOUT_S)
        operation = stub.GetOperation(pb.GetOperationRequest(name=name), timeout=TIMEOUT_S)
        assert (operation.done, operation.error.code) == (True, code_pb2.CANCELLED)
    with door.client() as client:
        assert client.run("first").state == client.correction("first", "c1").state == "cancelled"


def test_only_what_has_ended_is_forgotten(door: Door, stub: Any) -> None:
    """A deleted operation is not found and not listed any more; its run stays."""
    door.plant(run("first"))
    delete = pb.DeleteOperationRequest(name=FIRST)
    assert refusal(stub.DeleteOperation, delete) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_UNDER_WAY")
    door.tell(work_pb2.Event(subject="runs/first", cancelled={}))
    stub.DeleteOperation(delete, timeout=TIMEOUT_S)
    gone = (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
    assert refusal(stub.DeleteOperation, delete) == gone
    for call, request in (
        (stub.GetOperation, pb.GetOperationRequest(name=FIRST)),
        (stub.WaitOperation, pb.WaitOperationRequest(name=FIRST)),
        (stub.CancelOperation, pb.CancelOperationRequest(name=FIRST)),
    ):
        assert refusal(call, request) == gone
    assert listed(stub) == []
    with door.client() as client:
        assert client.run("first").state == "cancelled"


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_operations_are_listed(door: Door, stub: Any, size: int) -> None:
    """Newest run first, each search before its corrections; of one run or all, ended or not, in pages of any size."""
    door.plant(
        run("old", created=1000, state=Run.STATE_SUCCEEDED),
        *(correction(f"runs/old/corrections/c{number}", created=1000 + number) for number in (1, 2, 3)),
        *(run(name, created=2000) for name in ("same-a", "same-b")),
        run("new", created=3000, state=Run.STATE_FAILED),
    )
    door.tell(work_pb2.Event(subject="runs/old/corrections/c2", cancelled={}))
    of_old = [f"runs/old/operations/{operation}" for operation in ("search", "c1", "c2", "c3")]
    searches = [f"runs/{name}/operations/search" for name in ("new", "same-b", "same-a")]
    assert listed(stub, size=size) == listed(stub, "runs/-", size=size) == [*searches, *of_old]
    assert listed(stub, "runs/old", size=size) == of_old
    assert listed(stub, wanted="done=true", size=size) == [searches[0], of_old[0], of_old[2]]
    assert listed(stub, "runs/old", "done = false", size=size) == [of_old[1], of_old[3]]


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (pb.GetOperationRequest(name=FIRST), grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND"),
        (pb.GetOperationRequest(name="runs/first/operations/c1"), grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND"),
        (pb.GetOperationRequest(name="operations/c1"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NAME"),
        (pb.ListOperationsRequest(name="runs/first"), grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),
        (pb.ListOperationsRequest(filter="state=done"), grpc.StatusCode.INVALID_ARGUMENT, "BAD_FILTER"),
        (pb.ListOperationsRequest(page_size=-1), grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAGE_SIZE"),
        (pb.ListOperationsRequest(page_token="x"), grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAGE_TOKEN"),
    ],
)
def test_what_is_refused(stub: Any, request_: Any, code: grpc.StatusCode, reason: str) -> None:
    """A refusal has its code, and its reason for programs."""
    call = stub.GetOperation if isinstance(request_, pb.GetOperationRequest) else stub.ListOperations
    assert refusal(call, request_) == (code, reason)


def test_a_release_is_an_operation(door: Door, stub: Any) -> None:
    """Under the id of its request, of its model, with what was done as its response; it cannot be cancelled."""
    finished = Correction(
        name="runs/first/corrections/c1", model="models/tiny", state=Correction.STATE_SUCCEEDED, base_version=1
    )
    door.plant(run("first"), finished)
    request = gateway_pb.ReleaseCorrectionRequest(name=finished.name, actor="ann", request_id="bold")
    name = "models/tiny/operations/bold"
    with grpc.insecure_channel(door.address) as channel:
        waiting = gateway_pb_grpc.GatewayServiceStub(channel).ReleaseCorrection.future(request, timeout=TIMEOUT_S)
        eventually(lambda: listed(stub, "models/tiny") == [name])
        assert refusal(stub.CancelOperation, pb.CancelOperationRequest(name=name)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_CANCELLABLE",
        )
        release = release_pb2.Release(model="models/tiny", version=2, correction=finished.name)
        door.tell(work_pb2.Event(subject="models/tiny/publications/bold", published={"release": release}))
        operation = stub.WaitOperation(pb.WaitOperationRequest(name=name), timeout=TIMEOUT_S)
        assert waiting.result().release == release
    metadata, response = operation_pb2.OperationMetadata(), release_pb2.Release()
    assert operation.metadata.Unpack(metadata)
    assert operation.response.Unpack(response)
    assert (metadata.target, metadata.verb, response) == ("models/tiny", "release", release)
    assert listed(stub, "models/tiny", "done=false") == []
    assert listed(stub) == [FIRST, "runs/first/operations/c1"]
