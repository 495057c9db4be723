"""`defuse audit` with a fake gateway: three events on two pages."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from defuse.cli import app
from defuse.v1 import access_pb2, audit_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from typer.testing import CliRunner, Result

from tests.unit.client.gateway_server import connected


def event(number: int) -> audit_pb2.AuditEvent:
    return audit_pb2.AuditEvent(
        time={"seconds": 1_700_000_000 - number},
        caller="ann" if number else "",
        role=access_pb2.ROLE_ADMIN if number else access_pb2.ROLE_UNSPECIFIED,
        method="defuse.v1.GatewayService/StopTrial",
        resources=[f"models/tiny/trials/t{number}"],
        code="NOT_FOUND" if number else "OK",
        reason="TRIAL_NOT_FOUND" if number else "",
        peer="ipv4:10.0.0.7:4711",
        trace_id="0af7651916cd43dd8448eb211c80319c",
    )


class Gateway(pb_grpc.GatewayServiceServicer):
    """Records the requested pages."""

    def __init__(self) -> None:
        self.requested: list[tuple[int, str]] = []

    def ListAuditEvents(self, request: pb.ListAuditEventsRequest, context: Any) -> pb.ListAuditEventsResponse:  # noqa: N802  # gRPC's name
        self.requested.append((request.page_size, request.page_token))
        if request.page_token:
            return pb.ListAuditEventsResponse(events=[event(2)])
        return pb.ListAuditEventsResponse(events=[event(0), event(1)], next_page_token="more")


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    found = Gateway()
    with connected(found) as connection:
        monkeypatch.setenv("DEFUSE_GATEWAY", connection.address)
        monkeypatch.setenv("COLUMNS", "200")
        yield found


def audit(*options: str) -> Result:
    done = CliRunner().invoke(app, ["audit", *options])
    assert done.exit_code == 0, done.output
    return done


def test_audit_as_json(gateway: Gateway) -> None:
    """JSON has every field of the events on all pages, newest first."""
    first, second, last = json.loads(audit("--json").stdout)
    assert gateway.requested == [(50, ""), (48, "more")]
    assert (first["caller"], first["role"], first["code"]) == ("", "", "OK")
    assert (second["caller"], second["role"], second["reason"]) == ("ann", "admin", "TRIAL_NOT_FOUND")
    assert (last["resources"], last["peer"]) == (["models/tiny/trials/t2"], "ipv4:10.0.0.7:4711")
    assert last["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert first["time"].startswith("2023-11-14T22:13:20")


def test_audit_limit(gateway: Gateway) -> None:
    """The client requests no more events than it shows."""
    assert len(json.loads(audit("--limit", "2", "--json").stdout)) == 2
    assert gateway.requested == [(2, "")]


def test_audit_table(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is a line: time, caller, role, call, resources, outcome, peer."""
    shown = audit().stdout
    for word in ("2023-11-14 22:13:20 UTC", "ann", "admin", "StopTrial", "t1", "TRIAL_NOT_FOUND", "OK", "newest first"):
        assert word in shown
