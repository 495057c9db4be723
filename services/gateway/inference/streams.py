"""Streams of requests for inference: each request goes to the version that it means, and its answer comes back in it.

A request that the gateway refuses is answered with its error, as Triton answers one: the stream goes on. Trials draw
from single requests only.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from defuse.errors import DefuseError
from tritonclient.grpc import service_pb2

from services.gateway.inference.memory import SharedMemory
from services.gateway.inference.routes import Routes
from services.gateway.inference.wire import read_target

# Answers that wait for the caller to read them; Triton's side waits then, too.
_WAITING = 2


class StreamPassage:
    """Passes streams on to Triton, whose `ModelStreamInfer` is `method`."""

    def __init__(self, method: Any, routes: Routes, memory: SharedMemory) -> None:
        self._method = method
        self._routes = routes
        self._memory = memory

    async def answer(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Yield the answers to a stream of requests until both sides have ended it."""
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
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # Triton ended the stream: `_take` sees it
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
    """Put Triton's answers where the caller gets them; None is the end, whatever it is."""
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
    """Return what a caller is told of a code of Triton: a cancellation that nobody asked for means that it stops."""
    return grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.CANCELLED else code
