"""Retries of calls, with a server that is unavailable for some calls."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from defuse.connection import Connection, retry_service_config
from defuse.errors import DefuseError, NotFound, Unavailable, to_status
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from defuse.v1 import generator_service_pb2
from grpc_status import rpc_status

from tests.unit.client.gateway_server import connected

SERVICES = (
    pb.DESCRIPTOR.services_by_name["GatewayService"],
    generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"],
)


class Gateway(pb_grpc.GatewayServiceServicer):
    """Refuses its first calls."""

    def __init__(self) -> None:
        self.refusals: list[DefuseError] = []
        self.calls = 0

    def GetRun(self, request: pb.GetRunRequest, context: grpc.ServicerContext) -> pb.GetRunResponse:  # noqa: N802  # gRPC's name
        self._refuse(context)
        return pb.GetRunResponse(run={"name": request.name})

    def CancelRun(self, request: pb.CancelRunRequest, context: grpc.ServicerContext) -> pb.CancelRunResponse:  # noqa: N802
        self._refuse(context)
        return pb.CancelRunResponse(run={"name": request.name})

    def CreateRun(self, request: pb.CreateRunRequest, context: grpc.ServicerContext) -> pb.CreateRunResponse:  # noqa: N802
        self._refuse(context)
        return pb.CreateRunResponse(run={"name": request.run_id})

    def _refuse(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        if self.refusals:
            context.abort_with_status(rpc_status.to_status(to_status(self.refusals.pop(0))))


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def connection(gateway: Gateway) -> Iterator[Connection]:
    with connected(gateway) as found:
        yield found


READ, STOP = pb.GetRunRequest(name="runs/a"), pb.CancelRunRequest(name="runs/a")


@pytest.mark.parametrize(("method", "request_"), [("GetRun", READ), ("CancelRun", STOP)])
def test_idempotent_calls_are_retried(connection: Connection, gateway: Gateway, method: str, request_: Any) -> None:
    """Reads and idempotent calls are retried until the response."""
    gateway.refusals = [Unavailable("starting")] * 2
    assert connection.call(method, request_).run.name == "runs/a"
    assert gateway.calls == 3


def test_last_error_is_raised(connection: Connection, gateway: Gateway) -> None:
    """After four attempts the caller receives the server's error."""
    gateway.refusals = [Unavailable("starting", reason="TRITON_UNAVAILABLE")] * 9
    with pytest.raises(Unavailable, match="starting") as caught:
        connection.call("GetRun", READ)
    assert (gateway.calls, caught.value.reason) == (4, "TRITON_UNAVAILABLE")


def test_other_calls_are_not_retried(connection: Connection, gateway: Gateway) -> None:
    """A run that may have been started is not started again."""
    gateway.refusals = [Unavailable("starting")]
    with pytest.raises(Unavailable):
        connection.call("CreateRun", pb.CreateRunRequest(run_id="a"))
    assert gateway.calls == 1


def test_other_errors_are_not_retried(connection: Connection, gateway: Gateway) -> None:
    """Only UNAVAILABLE is retried."""
    gateway.refusals = [NotFound("no such run")]
    with pytest.raises(NotFound):
        connection.call("GetRun", READ)
    assert gateway.calls == 1


def test_retried_methods() -> None:
    """Exactly the unary methods with an idempotency level are retried."""
    [policy] = json.loads(retry_service_config(*SERVICES))["methodConfig"]
    repeated = {name["method"] for name in policy["name"]}
    assert {"GetRun", "ListRegions", "CreateDataset", "StopTrial", "EstimateRun", "Encode"} <= repeated
    once = {"CreateRun", "CreateModel", "CreateCorrection", "AnnotateRegion", "ReleaseCorrection", "RollbackModel"}
    streams = {"UploadFile", "WatchRun", "ExportRegions", "Identify"}
    assert {"GetOperation", "ListOperations", "WaitOperation", "CancelOperation"} <= repeated
    assert "DeleteOperation" not in repeated
    assert not repeated & (once | streams | {"JudgeCandidate", "StartTrial", "LearnValidity"})
    assert policy["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
