"""Calls under way when a service stops: what does not end in time is told to ask whoever is there next."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from defuse.errors import Unavailable

from services.runtime.interceptors import Continuation, around

# What the last answers need on their way.
_ANSWER_S = 1.0


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """Knows the calls under way, and stops a server without a call that ends as cancelled.

    That is how gRPC itself ends them, and callers take it for somebody's wish; of Unavailable they know that to ask
    again is right.
    """

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._over = False

    async def stop(self, server: grpc.aio.Server, drain_s: float) -> None:
        """Take no more calls, give those under way some seconds, and end the rest."""
        stopping = asyncio.create_task(server.stop(drain_s + _ANSWER_S))
        await asyncio.wait([stopping], timeout=drain_s)
        self._over = True
        self._ended |= self._under_way
        for call in self._ended:
            call.cancel()
        await stopping

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        return handler and around(handler, self._known)

    @asynccontextmanager
    async def _known(self, request: Any, _: Any) -> AsyncIterator[Any]:
        if self._over:
            raise _stopping()
        call = asyncio.current_task()
        assert call
        self._under_way.add(call)
        try:
            yield request
        except asyncio.CancelledError:
            if call not in self._ended:  # the caller has gone
                raise
            call.uncancel()
            raise _stopping() from None
        finally:
            self._under_way.discard(call)


def _stopping() -> Unavailable:
    return Unavailable("this server stops; ask again, another one may be there", reason="STOPPING")
