"""A gRPC connection to a gateway: address, credentials, deadlines, retries."""

import getpass
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from defuse.errors import DeadlineExceeded, InvalidInput, Unavailable, from_rpc_error
from defuse.tls import SCHEME, TlsFiles, is_loopback, is_secure, open_channel, target_of
from defuse.v1 import (
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
    monitor_service_pb2,
    monitor_service_pb2_grpc,
)

_SERVICES = (
    gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"],
    generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"],
    monitor_service_pb2.DESCRIPTOR.services_by_name["MonitorService"],
)
_RETRYABLE_LEVELS = (MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT)
# Google's contract states no idempotency levels. A second DeleteOperation is an error, so that it is not listed.
_RETRYABLE_OPERATIONS = [
    {"service": "google.longrunning.Operations", "method": method}
    for method in ("GetOperation", "ListOperations", "WaitOperation", "CancelOperation")
]
# Four attempts within about two seconds bridge the restart of a server, but not its absence.
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_RECONNECT_S = 1.0


class Credentials:
    """The bearer token of a connection.

    By default the token comes from the environment. An empty `token` means that none is sent.
    """

    def __init__(self, token: str | None, address: str) -> None:
        self._token_metadata = token_metadata(find_token() if token is None else token, address)

    def metadata(self) -> list[tuple[str, str]]:
        """Return the metadata of a call: token and trace context."""
        return [*self._token_metadata, *trace_metadata()]

    def user(self) -> str:
        """Return the user's name as the default actor of a call.

        It is empty for callers with a token, whom the gateway knows.
        """
        return "" if self._token_metadata else getpass.getuser()


def find_token() -> str:
    """Return the token of the environment, or an empty string.

    It is in `DEFUSE_TOKEN` or in the file `DEFUSE_TOKEN_FILE`. Raises InvalidInput for a file that cannot be read.
    """
    if token := os.environ.get("DEFUSE_TOKEN"):
        return token
    file = os.environ.get("DEFUSE_TOKEN_FILE")
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"DEFUSE_TOKEN_FILE: {file} cannot be read ({error})", reason="BAD_TOKEN") from error


def token_metadata(token: str, address: str) -> list[tuple[str, str]]:
    """Return the authorization metadata of calls to an address.

    It is empty without a token. Raises InvalidInput for a token that is not printable ASCII, and for an unencrypted
    address on another host.
    """
    if not token:
        return []
    if not token.isascii() or not token.isprintable():
        raise InvalidInput(
            "the token contains invalid characters, for instance a line break; set it exactly as it was printed",
            reason="BAD_TOKEN",
        )
    if not is_secure(address) and not is_loopback(target_of(address)):
        raise InvalidInput(
            f"the token would travel to {address} in the clear; use {SCHEME}{address}, or call without a token",
            reason="TOKEN_IN_THE_CLEAR",
        )
    return [("authorization", f"Bearer {token}")]


def trace_metadata() -> list[tuple[str, str]]:
    """Return the caller's OpenTelemetry trace context as metadata.

    The metadata is empty without tracing. The package is taken from the loaded modules, so that programs without
    tracing never import it.
    """
    propagate = sys.modules.get("opentelemetry.propagate")
    carrier: dict[str, str] = {}
    if propagate:
        propagate.inject(carrier)
    return list(carrier.items())


def retry_service_config(*services: ServiceDescriptor) -> str:
    """Return a gRPC service config that retries idempotent unary methods.

    The contract marks these methods by `idempotency_level`. Methods of google.longrunning.Operations are added.
    """
    methods = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if method.GetOptions().idempotency_level in _RETRYABLE_LEVELS
        and not method.client_streaming
        and not method.server_streaming
    ]
    return json.dumps({"methodConfig": [{"name": methods + _RETRYABLE_OPERATIONS, "retryPolicy": _RETRY_POLICY}]})


CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.service_config", retry_service_config(*_SERVICES)),
)


class Connection:
    """A gRPC connection to a gateway; methods are called by name.

    Args:
        address: HOST:PORT, or grpcs://HOST:PORT for TLS.
        timeout_s: Deadline of calls without one of their own, in seconds.
        token: Bearer token; None takes the token of the environment.
    """

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self.credentials = Credentials(token, address)
        self._timeout_s = timeout_s
        self._channel = open_channel(grpc, address, TlsFiles.of_environment(), options=CHANNEL_OPTIONS)
        self._stubs = make_stubs(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the response to a request or to an iterator of requests.

        Raises a DefuseError.
        """
        try:
            return find_method(self._stubs, method)(
                request, timeout=timeout_s or self._timeout_s, metadata=self.credentials.metadata()
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address) from error

    def watch(self, method: str, request: Any, timeout_s: float | None) -> Iterator[Any]:
        """Yield the messages of a stream; reconnect after connection losses.

        It reconnects while the gateway or Redis is unavailable. Each attempt sends the current state of `request`, so
        that a reader can resume. Raises DeadlineExceeded after `timeout_s` seconds.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = max(0.0, end - time.monotonic())
            call = find_method(self._stubs, method)(
                request, timeout=None if timeout_s is None else left, metadata=self.credentials.metadata()
            )
            try:
                yield from call
            except grpc.RpcError as error:
                time.sleep(reconnect_delay_s(error, self.address, method, timeout_s=timeout_s, end=end))
            else:
                return
            finally:
                call.cancel()  # the reader may stop before the end


def make_stubs(channel: Any) -> Sequence[Any]:
    """Return a stub for each service; their method names are distinct."""
    return [
        gateway_service_pb2_grpc.GatewayServiceStub(channel),
        generator_service_pb2_grpc.GeneratorServiceStub(channel),
        monitor_service_pb2_grpc.MonitorServiceStub(channel),
        operations_pb2_grpc.OperationsStub(channel),
    ]


def find_method(stubs: Sequence[Any], name: str) -> Any:
    """Return the method of that name from one of the stubs."""
    return next(getattr(stub, name) for stub in stubs if hasattr(stub, name))


def reconnect_delay_s(error: grpc.RpcError, address: str, method: str, *, timeout_s: float | None, end: float) -> float:
    """Return the seconds to wait before a broken stream is requested again.

    Raises DeadlineExceeded at `end` (monotonic time), and every error but Unavailable.
    """
    known = from_rpc_error(error, address=address)
    if isinstance(known, Unavailable | DeadlineExceeded) and time.monotonic() >= end:
        raise DeadlineExceeded(
            f"{method} had not ended after {timeout_s:g} s ({known.message}); the work goes on: call again, or "
            "wait longer"
        ) from error
    if not isinstance(known, Unavailable):
        raise known from error
    return min(_RECONNECT_S, max(0.0, end - time.monotonic()))


def find_gateway() -> str:
    """Return the address in `DEFUSE_GATEWAY`, or that of the local stack.

    Raises Unavailable if there is neither.
    """
    if address := os.environ.get("DEFUSE_GATEWAY"):
        return address
    state = Path(os.environ.get("DEFUSE_HOME", Path.home() / ".defuse")) / "stack.json"
    try:
        return str(json.loads(state.read_text())["addresses"]["gateway"])
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(
            f"no gateway address: DEFUSE_GATEWAY is not set and {state} has none; start a local stack with `defuse up`",
            reason="NO_GATEWAY",
        ) from error
