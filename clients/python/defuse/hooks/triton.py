"""The hook in a client of `tritonclient.grpc`, blocking or on an event loop; that package is not imported for it."""

from typing import Any, TypeVar

import grpc

from defuse.errors import InvalidInput
from defuse.hooks.monitor import Monitor

C = TypeVar("C")


def watch(client: C, monitor: Monitor) -> C:
    """Have a monitor see what an `InferenceServerClient` asks by `infer` and `async_infer`; return the client.

    Everything else of the client stays as it was; streams are not looked at.
    """
    stub: Any = getattr(client, "_client_stub", None)
    channel: Any = getattr(client, "_channel", None)
    if stub is None or not hasattr(stub, "ModelInfer"):
        raise InvalidInput(
            f"{type(client).__name__} is no InferenceServerClient of tritonclient.grpc; hook a monitor into a channel "
            "with grpc.intercept_channel, or use Monitor.log"
        )
    if isinstance(channel, grpc.aio.Channel):
        stub.ModelInfer = _Awaited(stub.ModelInfer, monitor)
    else:
        stub.ModelInfer = type(stub)(grpc.intercept_channel(channel, monitor)).ModelInfer
    return client


class _Awaited:
    """`ModelInfer` on an event loop: a channel there takes no interceptors once it is made."""

    def __init__(self, infer: Any, monitor: Monitor) -> None:
        self._infer = infer
        self._monitor = monitor

    async def __call__(self, request: Any, **options: Any) -> Any:
        asked = self._monitor.asked(request)
        response = await self._infer(request, **options)
        self._monitor.answered(asked, response)
        return response
