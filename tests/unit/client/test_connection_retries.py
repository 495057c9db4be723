"""Calls that are made again, before a real server that is unavailable as often as a test says."""

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
def test_a_server_that_is_away_for_a_moment(
    connection: Connection, gateway: Gateway, method: str, request_: Any
) -> None:
    """What only looks, and what changes nothing the second time, is asked again until it is answered."""
    gateway.refusals = [Unavailable("starting")] * 2
    assert connection.call(method, request_).run.name == "runs/a"
    assert gateway.calls == 3


def test_a_server_that_stays_away(connection: Connection, gateway: Gateway) -> None:
    """After four attempts the caller hears the server's own words."""
    gateway.refusals = [Unavailable("starting", reason="TRITON_UNAVAILABLE")] * 9
    with pytest.raises(Unavailable, match="starting") as caught:
        connection.call("GetRun", READ)
    assert (gateway.calls, caught.value.reason) == (4, "TRITON_UNAVAILABLE")


def test_what_would_be_done_twice_is_not_repeated(connection: Connection, gateway: Gateway) -> None:
    """A run that may have been started is not started again."""
    gateway.refusals = [Unavailable("starting")]
    with pytest.raises(Unavailable):
        connection.call("CreateRun", pb.CreateRunRequest(run_id="a"))
    assert gateway.calls == 1


def test_what_trying_again_does_not_help(connection: Connection, gateway: Gateway) -> None:
    """Only UNAVAILABLE is worth another attempt."""
    gateway.refusals = [NotFound("no such run")]
    with pytest.raises(NotFound):
        connection.call("GetRun", READ)
    assert gateway.calls == 1


def test_what_the_contract_says() -> None:
    """Calls that change something each time, streams, and calls that say nothing are not repeated; all others are."""
    [policy] = json.loads(retry_service_config(*SERVICES))["methodConfig"]
    repeated = {name["method"] for name in policy["name"]}
    assert {"GetRun", "ListRegions", "CreateDataset", "StopTrial", "EstimateRun", "Encode"} <= repeated
    once = {"CreateRun", "CreateModel", "CreateCorrection", "AnnotateRegion", "ReleaseCorrection", "RollbackModel"}
    streams = {"UploadFile", "WatchRun", "ExportRegions", "Identify"}
    assert {"GetOperation", "ListOperations", "WaitOperation", "CancelOperation"} <= repeated
    assert "DeleteOperation" not in repeated
    assert not repeated & (once | streams | {"JudgeCandidate", "StartTrial", "LearnValidity"})
    assert policy["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
