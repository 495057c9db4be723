"""Channels to other servers, and calls to other services.

A channel uses TLS when its address asks for it, and carries the trace context.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc
from defuse.errors import from_rpc_error
from defuse.tls import TlsFiles, open_channel

from services.runtime import tracing
from services.runtime.settings import MAX_MESSAGE_BYTES

UNLIMITED = -1


def channel_to(address: str, tls: TlsFiles, *, receive_bytes: int) -> Any:
    """Return an asyncio channel to HOST:PORT or grpcs://HOST:PORT that takes answers of so many bytes."""
    options = [("grpc.max_receive_message_length", receive_bytes), ("grpc.max_send_message_length", UNLIMITED)]
    return open_channel(grpc.aio, address, tls, options=options, interceptors=tracing.client_interceptors())


S = TypeVar("S")
# Loading a model takes seconds; nothing that a service answers at once takes longer than this.
DEADLINE_S = 120.0


class ServiceClient(Generic[S]):
    """A service that this one calls."""

    def __init__(self, url: str, stub: Callable[[grpc.aio.Channel], S], tls: TlsFiles) -> None:
        self.url = url
        self._channel = channel_to(url, tls, receive_bytes=MAX_MESSAGE_BYTES)
        self._stub = stub(self._channel)

    async def call(self, method: Callable[..., Any], *, deadline_s: float | None = DEADLINE_S) -> Any:
        """Make a call with a deadline, that of the caller where a thing takes long; raise what the other side meant."""
        try:
            return await method(self._stub, timeout=deadline_s or DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=self.url) from error

    async def close(self) -> None:
        await self._channel.close()
