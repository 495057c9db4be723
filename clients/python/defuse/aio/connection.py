"""A connection to a gateway on an event loop; what it promises is what `defuse.connection` promises."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from defuse.bearer import Bearer
from defuse.connection import OPTIONS, method_of, pause_s, stubs_on
from defuse.errors import from_rpc_error
from defuse.tls import TlsFiles, open_channel


class Connection:
    """Calls the methods of a gateway by name; `timeout_s` is the deadline of calls that answer at once."""

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self.bearer = Bearer(token, address)
        self._timeout_s = timeout_s
        self._channel = open_channel(grpc.aio, address, TlsFiles.of_environment(), options=OPTIONS)
        self._stubs = stubs_on(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the answer to a request, or to an iterator of requests; raise a DefuseError."""
        try:
            return await method_of(self._stubs, method)(
                request, timeout=timeout_s or self._timeout_s, metadata=self.bearer.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=self.address) from error

    async def watch(self, method: str, request: Any, timeout_s: float | None) -> AsyncGenerator[Any, None]:
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
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(pause_s(error, self.address, method, timeout_s=timeout_s, end=end))
            else:
                return
            finally:
                call.cancel()  # a reader that stops reading ends the call
