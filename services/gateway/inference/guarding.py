"""Requests that ask for the guard: answered by the ensemble of classifier and guard, with one request to Triton.

A caller asks with the metadata `defuse-guard: true`, and finds the guard's outputs beside the classifier's. Where a
model has no guard, or it is just being changed, the caller gets the classifier's answer, which says so.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from defuse import names
from defuse.guard_outputs import METADATA, OUTPUTS
from tritonclient.grpc import service_pb2

from services.gateway.inference.wire import Target, names_outputs, retargeted

_ASKED_FOR = service_pb2.ModelInferRequest(
    outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in OUTPUTS]
).SerializeToString()
_ABSENT = service_pb2.ModelInferResponse(
    parameters={"defuse_guard": service_pb2.InferParameter(string_param="absent")}
).SerializeToString()
# What Triton answers where it has no such model, or none that is ready.
_NOT_THERE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)

Infer = Callable[[bytes, float | None], Awaitable[bytes]]


def asks_for_guard(context: Any) -> bool:
    """Say whether a caller asks for the guard."""
    return any(key == METADATA and value == "true" for key, value in context.invocation_metadata() or ())


async def guarded(request: bytes, target: Target, infer: Infer, *, champion: bytes, context: Any) -> bytes:
    """Return the answer of classifier and guard to a request; the classifier's to `champion` where there is no guard.

    Messages of the wire format are joined by writing one behind the other, so tensors are not looked at here either.
    """
    wanted = retargeted(request, target, model=names.guarded_model(target.model), version="")
    if names_outputs(request):
        wanted = b"".join((wanted, _ASKED_FOR))
    try:
        return await infer(wanted, context.time_remaining())
    except grpc.aio.AioRpcError as error:
        if error.code() not in _NOT_THERE:
            raise
    return b"".join((await infer(champion, context.time_remaining()), _ABSENT))
