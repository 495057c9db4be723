"""A connection to a gateway: where it is, deadlines, streams that survive its absence, errors by class."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc

from defuse.bearer import Bearer
from defuse.errors import DeadlineExceeded, Unavailable, from_rpc_error
from defuse.retries import service_config
from defuse.tls import TlsFiles, open_channel
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
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_RECONNECT_S = 1.0
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.service_config", service_config(*_SERVICES)),
)


class Connection:
    """Calls the methods of a gateway by name; `timeout_s` is the deadline of calls that answer at once."""

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self.bearer = Bearer(token, address)
        self._timeout_s = timeout_s
        self._channel = open_channel(grpc, address, TlsFiles.of_environment(), options=OPTIONS)
        self._stubs = stubs_on(self._channel)

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the answer to a request, or to an iterator of requests; raise a DefuseError."""
        try:
            return method_of(self._stubs, method)(
                request, timeout=timeout_s or self._timeout_s, metadata=self.bearer.metadata()
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address) from error

    def watch(self, method: str, request: Any, timeout_s: float | None) -> Iterator[Any]:
        """Yield a stream's messages; connect again while the gateway or Redis is away.

        A request that the reader changes as it goes, to say where it is, is sent as it then is. Raises DeadlineExceeded
        after `timeout_s` seconds, whether the gateway answers or not.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = max(0.0, end - time.monotonic())
            call = method_of(self._stubs, method)(
                request, timeout=None if timeout_s is None else left, metadata=self.bearer.metadata()
            )
            try:
                yield from call
            except grpc.RpcError as error:
                time.sleep(pause_s(error, self.address, method, timeout_s=timeout_s, end=end))
            else:
                return
            finally:
                call.cancel()  # a reader that stops reading ends the call


def stubs_on(channel: Any) -> Sequence[Any]:
    """Return a stub of each service that a gateway offers; their methods have different names."""
    return [
        gateway_service_pb2_grpc.GatewayServiceStub(channel),
        generator_service_pb2_grpc.GeneratorServiceStub(channel),
        monitor_service_pb2_grpc.MonitorServiceStub(channel),
        operations_pb2_grpc.OperationsStub(channel),
    ]


def method_of(stubs: Sequence[Any], name: str) -> Any:
    return next(getattr(stub, name) for stub in stubs if hasattr(stub, name))


def pause_s(error: grpc.RpcError, address: str, method: str, *, timeout_s: float | None, end: float) -> float:
    """Return how long to wait before a stream that broke off is asked for again; raise what else its end means."""
    known = from_rpc_error(error, address=address)
    if isinstance(known, Unavailable | DeadlineExceeded) and time.monotonic() >= end:
        raise DeadlineExceeded(
            f"{method} had not ended after {timeout_s:g} s ({known.message}); what it waits for goes on: ask again, or "
            "wait longer"
        ) from error
    if not isinstance(known, Unavailable):
        raise known from error
    return min(_RECONNECT_S, max(0.0, end - time.monotonic()))


def find_gateway() -> str:
    """Return the address in `DEFUSE_GATEWAY`, or of the local stack of this user."""
    if address := os.environ.get("DEFUSE_GATEWAY"):
        return address
    state = Path(os.environ.get("DEFUSE_HOME", Path.home() / ".defuse")) / "stack.json"
    try:
        return str(json.loads(state.read_text())["addresses"]["gateway"])
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(
            f"no gateway is known: DEFUSE_GATEWAY is not set and {state} names none; start a stack with `defuse up`",
            reason="NO_GATEWAY",
        ) from error
