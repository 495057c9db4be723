"""The same hook for channels on an event loop."""

from contextlib import suppress
from typing import Any

import grpc

from defuse.hooks.monitor import Monitor
from defuse.hooks.splitting import MODEL_INFER


class AioInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    """Hooks a monitor into a channel of `grpc.aio`: one of the `interceptors` that it is made with."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Make a call, and look at its answer when it comes."""
        if _name(client_call_details.method) != MODEL_INFER:
            return await continuation(client_call_details, request)
        asked = self._monitor.asked(request)
        call = await continuation(client_call_details, request)
        with suppress(grpc.RpcError):  # its caller awaits the same call, and is told there
            self._monitor.answered(asked, await call)
        return call


def _name(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
