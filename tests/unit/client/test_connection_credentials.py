"""Sources and destinations of a client's token."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse import Client, InvalidInput, aio
from defuse.connection import find_token, token_metadata
from defuse.tls import is_loopback
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc

from tests.unit.client.gateway_server import connected

SENT = [("authorization", "Bearer abc")]


class Gateway(pb_grpc.GatewayServiceServicer):
    """Records the tokens and the actors of calls."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.actors: list[str] = []

    def GetVersion(self, request: pb.GetVersionRequest, context: grpc.ServicerContext) -> pb.GetVersionResponse:  # noqa: N802  # gRPC's name
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        return pb.GetVersionResponse()

    def WatchRun(self, request: pb.WatchRunRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchRunResponse]:  # noqa: N802
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        yield pb.WatchRunResponse()

    def RollbackModel(self, request: pb.RollbackModelRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.actors.append(request.actor)
        return pb.RollbackModelResponse(release={"create_time": {"seconds": 1}, "kind": "KIND_ROLLED_BACK"})


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def address(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("DEFUSE_TOKEN", "DEFUSE_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("LOGNAME", "ann")
    with connected(gateway) as connection:
        yield connection.address


def test_token_of_every_call(address: str, gateway: Gateway) -> None:
    """Unary calls and streams send the token; without one nothing is sent."""
    with Client(address, token="abc") as client:
        client.version()
        list(client.watch_run("first"))
    with Client(address) as client:
        client.version()
    assert gateway.tokens == ["Bearer abc", "Bearer abc", ""]


def test_client_on_an_event_loop(address: str, gateway: Gateway) -> None:
    """It sends the token, too, and no user name."""

    async def scenario() -> None:
        async with aio.Client(address, token="abc") as client:
            await client.version()
            _ = [run async for run in client.watch_run("first")]
            await client.rollback("tiny")

    asyncio.run(scenario())
    assert gateway.tokens == ["Bearer abc", "Bearer abc"]
    assert gateway.actors == [""]


def test_default_actor(address: str, gateway: Gateway) -> None:
    """Only callers without a token send the user's name.

    A given actor is always sent.
    """
    for token in ("", "abc"):
        with Client(address, token=token) as client:
            client.rollback("tiny")
            client.rollback("tiny", actor="bob")
    assert gateway.actors == ["ann", "bob", "", "bob"]


def test_find_token(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable precedes the file, whose line break is removed."""
    assert find_token() == ""
    (tmp_path / "token").write_text("of the file\n")
    monkeypatch.setenv("DEFUSE_TOKEN_FILE", str(tmp_path / "token"))
    assert find_token() == "of the file"
    monkeypatch.setenv("DEFUSE_TOKEN", "of the variable")
    assert find_token() == "of the variable"
    monkeypatch.delenv("DEFUSE_TOKEN")
    (tmp_path / "token").unlink()
    with pytest.raises(InvalidInput, match=f"DEFUSE_TOKEN_FILE: {tmp_path}/token"):
        find_token()


def test_argument_precedes_environment(address: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFUSE_TOKEN", "environment")
    for how in ({}, {"token": "argument"}):
        with Client(address, **how) as client:  # type: ignore[arg-type]
            client.version()
    assert gateway.tokens == ["Bearer environment", "Bearer argument"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/gateway", "grpcs://far.org:1"])
def test_allowed_addresses(address: str) -> None:
    """Tokens go to this host, and to other hosts by TLS."""
    assert token_metadata("abc", address) == SENT
    assert token_metadata("", address) == []


@pytest.mark.parametrize("address", ["far.org:1", "10.0.0.1:1", "0.0.0.0:1", "localhost.far.org:1", "dns:///localhost"])
def test_refused_addresses(address: str) -> None:
    """Tokens do not go to other hosts without TLS.

    Calls without a token do.
    """
    with pytest.raises(InvalidInput, match=f"in the clear; use grpcs://{address}") as refused:
        token_metadata("abc", address)
    assert refused.value.reason == "TOKEN_IN_THE_CLEAR"
    assert token_metadata("", address) == []


@pytest.mark.parametrize("token", ["a\nb", "ščř", "a\0"])
def test_invalid_token(token: str) -> None:
    with pytest.raises(InvalidInput, match="contains invalid characters") as refused:
        token_metadata(token, "localhost:1")
    assert token not in refused.value.message


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.1.2.3", True), ("::1", True), ("localhost", True), ("::", False), ("0.0.0.0", False), ("fe80::1", False)],
)
def test_is_loopback(host: str, here: bool) -> None:
    """Servers check the host of their address, without a port."""
    assert is_loopback(host) is here
