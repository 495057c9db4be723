"""The reverse proxy of `inference.GRPCInferenceService`.

It serves unary calls, streams and guarded requests, all as bytes. It replaces the first fields, model and version, when
a trial draws the request, and sends the rest to Triton unchanged. Triton's errors and the caller's deadline are passed
on as well. In a stream, a request that the gateway rejects is answered with its error, as Triton does, and the stream
continues. Trials draw unary requests only.

With the metadata `defuse-guard: true` a caller gets the guard's outputs beside the
classifier's. When a model has no guard, or its guard is being replaced, the caller gets
the classifier's answer with a parameter that says so.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn

import grpc
from defuse import names
from defuse.errors import DefuseError
from defuse.guard_outputs import METADATA, OUTPUTS
from defuse.tls import TlsFiles
from defuse.v1 import trial_pb2
from tritonclient.grpc import service_pb2

from services.gateway.inference.routing import (
    CHAMPION,
    RoutingTable,
    Target,
    challenger_of,
    names_outputs,
    read_target,
    with_target,
)
from services.gateway.inference.shadow import ShadowComparisons, TrialCounters
from services.gateway.inference.shared_memory import KINDS, REGISTER, STATUS, UNREGISTER, SharedMemory
from services.runtime.tls import UNLIMITED, channel_to

_ASKED_FOR = service_pb2.ModelInferRequest(
    outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in OUTPUTS]
).SerializeToString()
_ABSENT = service_pb2.ModelInferResponse(
    parameters={"defuse_guard": service_pb2.InferParameter(string_param="absent")}
).SerializeToString()
# Triton's status codes for a model that is missing or not ready.
_NOT_THERE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)

Infer = Callable[[bytes, float | None], Awaitable[bytes]]


def asks_for_guard(context: Any) -> bool:
    """Return whether the caller requests the guard's outputs."""
    return any(key == METADATA and value == "true" for key, value in context.invocation_metadata() or ())


async def infer_guarded(request: bytes, target: Target, infer: Infer, *, champion: bytes, context: Any) -> bytes:
    """Return the answer of classifier and guard.

    Without a guard, the result is the classifier's answer to `champion`, marked accordingly. Serialized protobuf
    messages are merged by concatenation, so tensors are not decoded here either.
    """
    wanted = with_target(request, target, model=names.guarded_model(target.model), version="")
    if names_outputs(request):
        wanted = b"".join((wanted, _ASKED_FOR))
    try:
        return await infer(wanted, context.time_remaining())
    except grpc.aio.AioRpcError as error:
        if error.code() not in _NOT_THERE:
            raise
    return b"".join((await infer(champion, context.time_remaining()), _ABSENT))


# Answers that wait for a slow caller; beyond them, reading from Triton pauses.
_WAITING = 2


class StreamProxy:
    """Proxies inference streams to Triton.

    `method` is Triton's `ModelStreamInfer`.
    """

    def __init__(self, method: Any, routes: RoutingTable, memory: SharedMemory) -> None:
        self._method = method
        self._routes = routes
        self._memory = memory

    async def answer(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Yield a stream's answers until both sides have ended it."""
        call = self._method(timeout=context.time_remaining())
        answers: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING)
        tasks = [
            asyncio.create_task(self._ask(call, requests, answers, context)),
            asyncio.create_task(_take(call, answers)),
        ]
        try:
            while (answer := await answers.get()) is not None:
                yield answer
            if (code := await call.code()) is not grpc.StatusCode.OK:
                await context.abort(code_for_caller(code), await call.details())
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()

    async def _ask(
        self, call: Any, requests: AsyncIterator[bytes], answers: "asyncio.Queue[bytes | None]", context: Any
    ) -> None:
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # `_take` reports the end
            async for request in requests:
                try:
                    self._memory.check(request, context)
                    named = self._routes.request_as_named(request)
                except DefuseError as error:
                    await answers.put(_refusal(request, error))
                else:
                    await call.write(named)
            await call.done_writing()


async def _take(call: Any, answers: "asyncio.Queue[bytes | None]") -> None:
    """Put Triton's answers into the caller's queue, then None as the end."""
    with suppress(grpc.aio.AioRpcError):
        async for answer in call:
            await answers.put(answer)
    await answers.put(None)


def _refusal(request: bytes, error: DefuseError) -> bytes:
    answer = service_pb2.ModelStreamInferResponse(error_message=error.message)
    with suppress(DefuseError):
        answer.infer_response.id = read_target(request).id
    data: bytes = answer.SerializeToString()
    return data


def code_for_caller(code: grpc.StatusCode) -> grpc.StatusCode:
    """Return the caller's status code for one of Triton's.

    A cancellation that nobody requested means that Triton is stopping, so it becomes UNAVAILABLE.
    """
    return grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.CANCELLED else code


SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Methods about the server and about models. Loading, unloading and changing models is left to the corrector; the server
# itself belongs to its operator.
_SERVER = ("ServerLive", "ServerReady", "ServerMetadata")
_MODEL = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")


async def _abort_as(error: grpc.aio.AioRpcError, context: Any) -> NoReturn:
    """Abort the call with Triton's own status."""
    await context.abort(code_for_caller(error.code()), error.details() or "")
    raise error


def _as_triton(method: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    """Make a method abort with Triton's status when Triton refuses.

    The method's last two parameters are `request` and `context`.
    """

    @functools.wraps(method)
    async def answer(*arguments: Any) -> bytes:
        try:
            return await method(*arguments)
        except grpc.aio.AioRpcError as error:
            await _abort_as(error, arguments[-1])

    return answer


class InferenceProxy(grpc.GenericRpcHandler):
    """Proxies the calls of `inference.GRPCInferenceService` to Triton."""

    def __init__(
        self, url: str, tls: TlsFiles, routes: RoutingTable, tally: TrialCounters, *, shared_memory: bool = False
    ) -> None:
        self._channel = channel_to(url, tls, receive_bytes=UNLIMITED)
        self._routes = routes
        self._tally = tally
        self._infer: Any = self._channel.unary_unary(_path("ModelInfer"))
        self._memory = SharedMemory(self._call, offered=shared_memory)
        streams = StreamProxy(self._channel.stream_stream(_path("ModelStreamInfer")), routes, self._memory)
        self._comparisons = ShadowComparisons(self._infer, tally)
        unary = grpc.unary_unary_rpc_method_handler
        self._handlers: dict[str, Any] = {
            _path("ModelInfer"): unary(self._forward_inference),
            _path("ModelStreamInfer"): grpc.stream_stream_rpc_method_handler(streams.answer),
            **{_path(name): unary(self._forward_metadata(name)) for name in _SERVER},
            **{_path(name): unary(self._forward_resolved(name)) for name in _MODEL},
            **{
                _path(f"{kind}SharedMemory{name}"): unary(self._shared(kind, name))
                for kind in KINDS
                for name in (STATUS, REGISTER, UNREGISTER)
            },
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler of a method; None for methods of other services."""
        return self._handlers.get(handler_call_details.method)

    async def close(self) -> None:
        await self._comparisons.close()
        await self._channel.close()

    async def _call(self, name: str, request: bytes, timeout: float | None) -> bytes:  # noqa: ASYNC109  # gRPC's own
        answer: bytes = await self._channel.unary_unary(_path(name))(request, timeout=timeout)
        return answer

    def _forward_metadata(self, name: str) -> Any:
        @_as_triton
        async def handler(request: bytes, context: Any) -> bytes:
            return await self._call(name, request, context.time_remaining())

        return handler

    def _forward_resolved(self, name: str) -> Any:
        @_as_triton
        async def handler(request: bytes, context: Any) -> bytes:
            return await self._call(name, self._routes.request_as_named(request), context.time_remaining())

        return handler

    def _shared(self, kind: str, name: str) -> Any:
        @_as_triton
        async def shared(request: bytes, context: Any) -> bytes:
            return await self._memory.answer(kind, name, request, context)

        return shared

    @_as_triton
    async def _forward_inference(self, request: bytes, context: Any) -> bytes:
        self._memory.check(request, context)
        target = read_target(request)
        route = self._routes.route(target)
        champion = with_target(request, target, model=route.model, version=route.version)
        if asks_for_guard(context) and target.version in {"", CHAMPION}:
            return await infer_guarded(request, target, self._ask_triton, champion=champion, context=context)
        if route.trial is None:
            answer: bytes = await self._infer(champion, timeout=context.time_remaining())
            return answer
        challenger = b""
        if route.drawn:
            model, version = challenger_of(route.trial)
            challenger = with_target(request, target, model=model, version=version)
        return await self._answer_in_trial(route.trial, champion, challenger, context)

    async def _ask_triton(self, request: bytes, timeout: float | None) -> bytes:  # noqa: ASYNC109  # gRPC's own
        answer: bytes = await self._infer(request, timeout=timeout)
        return answer

    async def _answer_in_trial(self, trial: trial_pb2.Trial, champion: bytes, challenger: bytes, context: Any) -> bytes:
        """Answer a request to a model that has a trial.

        `challenger` is the request to the challenger, empty when the request was not drawn.
        """
        if challenger and trial.mode == trial_pb2.Trial.MODE_CANARY:
            return await self._canary(trial, champion, challenger, context)
        answer = await self._timed(champion, trial, "champion", context.time_remaining())
        if challenger and trial.mode == trial_pb2.Trial.MODE_SHADOW:
            self._comparisons.begin(trial, challenger, answer)
        return answer

    async def _canary(self, trial: trial_pb2.Trial, champion: bytes, challenger: bytes, context: Any) -> bytes:
        """Answer from the challenger, or from the champion when the challenger fails.

        The challenger gets half of the caller's deadline.
        """
        left = context.time_remaining()
        try:
            return await self._timed(challenger, trial, "challenger", left and left / 2)
        except grpc.aio.AioRpcError:  # not when the caller has disconnected: that cancels this task
            pass
        answer = await self._timed(champion, trial, "champion", context.time_remaining())
        # Counted only now: a request that neither version answers is the caller's mistake, or Triton's.
        self._tally.add(trial.name, challenger_requests=1, challenger_errors=1)
        return answer

    async def _timed(self, request: bytes, trial: trial_pb2.Trial, who: str, seconds: float | None) -> bytes:
        begin = time.perf_counter()
        answer: bytes = await self._infer(request, timeout=seconds)
        self._tally.add(trial.name, **{f"{who}_requests": 1, f"{who}_seconds": time.perf_counter() - begin})
        return answer


def _path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"
