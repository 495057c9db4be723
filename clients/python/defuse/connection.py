"""A connection to a gateway: where it is, deadlines, streams that survive its absence, errors by class."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from defuse import bearer, tracing
from defuse.errors import DeadlineExceeded, Unavailable, from_rpc_error
from defuse.retries import service_config
from defuse.tls import TlsFiles, open_channel
from defuse.v1 import (
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
)

_SERVICES = (
    gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"],
    generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"],
)
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_RECONNECT_S = 1.0


class Connection:
    """Calls the methods of a gateway by name; `timeout_s` is the deadline of calls that answer at once.

    Whose calls they are a token says, by default that of the environment.
    """

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self._credentials = bearer.metadata(bearer.find_token() if token is None else token, address)
        self._timeout_s = timeout_s
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.service_config", service_config(*_SERVICES)),
        ]
        self._channel = open_channel(grpc, address, TlsFiles.of_environment(), options=options)
        self._stubs: list[Any] = [
            gateway_service_pb2_grpc.GatewayServiceStub(self._channel),
            generator_service_pb2_grpc.GeneratorServiceStub(self._channel),
        ]

    @property
    def has_token(self) -> bool:
        """Say whether the gateway knows by a token who calls."""
        return bool(self._credentials)

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the answer to a request, or to an iterator of requests; raise a DefuseError."""
        try:
            return self._method(method)(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata())
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
            call = self._method(method)(request, timeout=None if timeout_s is None else left, metadata=self._metadata())
            try:
                yield from call
            except grpc.RpcError as error:
                known = from_rpc_error(error, address=self.address)
                if isinstance(known, Unavailable | DeadlineExceeded) and time.monotonic() >= end:
                    raise DeadlineExceeded(
                        f"{method} had not ended after {timeout_s:g} s ({known.message}); what it waits for goes on: "
                        "ask again, or wait longer"
                    ) from error
                if not isinstance(known, Unavailable):
                    raise known from error
                time.sleep(min(_RECONNECT_S, max(0.0, end - time.monotonic())))
            else:
                return
            finally:
                call.cancel()  # a reader that stops reading ends the call

    def _metadata(self) -> list[tuple[str, str]]:
        return [*self._credentials, *tracing.metadata()]

    def _method(self, name: str) -> Any:
        """Return a method of either service that a gateway offers; their methods have different names."""
        return next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))


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
