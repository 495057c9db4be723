"""Calls from one service to another, with the other's errors passed on as they are."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc
from defuse.errors import from_rpc_error
from defuse.tls import TlsFiles

from services.runtime.channels import channel_to
from services.runtime.settings import MAX_MESSAGE_BYTES

S = TypeVar("S")
# Loading a model takes seconds; nothing that a service answers at once takes longer than this.
DEADLINE_S = 120.0


class Peer(Generic[S]):
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
