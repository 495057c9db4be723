"""`inference.GRPCInferenceService` at the public door.

Requests are bytes: their first fields say who is asked, and are replaced where a trial draws the request; the rest goes
to Triton as it came, and so do its errors and the caller's deadline.
"""

import time
from typing import Any, NoReturn

import grpc
from defuse.tls import TlsFiles
from defuse.v1 import trial_pb2
from tritonclient.grpc import service_pb2

from services.gateway.inference.comparisons import Comparisons
from services.gateway.inference.routes import Routes, challenger_of
from services.gateway.inference.tally import Tally
from services.gateway.inference.wire import read_target, retargeted
from services.runtime.channels import UNLIMITED, channel_to

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# What tells callers about models. What loads, unloads or changes them is the corrector's, and Triton is its operator's.
_TOLD = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics")


class InferencePassage(grpc.GenericRpcHandler):
    """Passes inference to Triton."""

    def __init__(self, url: str, tls: TlsFiles, routes: Routes, tally: Tally) -> None:
        self._channel = channel_to(url, tls, receive_bytes=UNLIMITED)
        self._routes = routes
        self._tally = tally
        self._infer: Any = self._channel.unary_unary(_path("ModelInfer"))
        self._comparisons = Comparisons(self._infer, tally)
        self._handlers: dict[str, Any] = {
            _path(name): grpc.unary_unary_rpc_method_handler(self._told(name)) for name in _TOLD
        }
        self._handlers[_path("ModelInfer")] = grpc.unary_unary_rpc_method_handler(self._answered)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler of a method; None for those of other services."""
        return self._handlers.get(handler_call_details.method)

    async def close(self) -> None:
        await self._comparisons.close()
        await self._channel.close()

    def _told(self, name: str) -> Any:
        call = self._channel.unary_unary(_path(name))

        async def told(request: bytes, context: Any) -> bytes:
            try:
                answer: bytes = await call(request, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await _abort_as(error, context)
            return answer

        return told

    async def _answered(self, request: bytes, context: Any) -> bytes:
        target = read_target(request)
        route = self._routes.route(target)
        champion = retargeted(request, target, model=route.model, version=route.version)
        try:
            if route.trial is None:
                answer: bytes = await self._infer(champion, timeout=context.time_remaining())
                return answer
            challenger = b""
            if route.drawn:
                model, version = challenger_of(route.trial)
                challenger = retargeted(request, target, model=model, version=version)
            return await self._tried(route.trial, champion, challenger, context)
        except grpc.aio.AioRpcError as error:
            await _abort_as(error, context)

    async def _tried(self, trial: trial_pb2.Trial, champion: bytes, challenger: bytes, context: Any) -> bytes:
        """Answer within a trial; `challenger` is the request to it, or nothing where it was not drawn."""
        if challenger and trial.mode == trial_pb2.Trial.MODE_CANARY:
            return await self._canary(trial, champion, challenger, context)
        answer = await self._timed(champion, trial, "champion", context.time_remaining())
        if challenger and trial.mode == trial_pb2.Trial.MODE_SHADOW:
            self._comparisons.begin(trial, challenger, answer)
        return answer

    async def _canary(self, trial: trial_pb2.Trial, champion: bytes, challenger: bytes, context: Any) -> bytes:
        """Answer by the challenger, which has half of the caller's time; by the champion where it fails."""
        left = context.time_remaining()
        try:
            return await self._timed(challenger, trial, "challenger", left and left / 2)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.CANCELLED:
                raise
        answer = await self._timed(champion, trial, "champion", context.time_remaining())
        # Only now: what nobody can answer is the caller's mistake, or Triton's.
        self._tally.add(trial.name, challenger_requests=1, challenger_errors=1)
        return answer

    async def _timed(self, request: bytes, trial: trial_pb2.Trial, who: str, seconds: float | None) -> bytes:
        begin = time.perf_counter()
        answer: bytes = await self._infer(request, timeout=seconds)
        self._tally.add(trial.name, **{f"{who}_requests": 1, f"{who}_seconds": time.perf_counter() - begin})
        return answer


def _path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"


async def _abort_as(error: grpc.aio.AioRpcError, context: Any) -> NoReturn:
    """Answer as Triton did."""
    await context.abort(error.code(), error.details() or "")
    raise error
