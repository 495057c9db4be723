"""Shared memory between local callers and Triton, registered through the gateway.

All callers share one name space of regions, and Triton opens any shared-memory file that a caller names. Shared memory
is therefore off by default and limited to callers of this host, and the services' own regions are never accessible.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from defuse.errors import InvalidInput, PermissionDenied
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from services.gateway.inference.routing import may_refer_to_memory
from services.triton.transport import OWN_REGION_PREFIX

KINDS = ("System", "Cuda")
STATUS, REGISTER, UNREGISTER = "Status", "Register", "Unregister"
_PARAMETER = "shared_memory_region"
# How gRPC writes the address of a local caller, with escaped brackets.
_HERE = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")
# Calls a method of Triton with its name, the serialized request, and a deadline in seconds.
Call = Callable[[str, bytes, float | None], Awaitable[bytes]]


class SharedMemory:
    """Checks and forwards shared-memory calls; refuses all of them unless `offered`."""

    def __init__(self, call: Call, *, offered: bool) -> None:
        self._call = call
        self._offered = offered

    async def answer(self, kind: str, name: str, request: bytes, context: Any) -> bytes:
        """Forward a call for one kind of memory.

        Raises PermissionDenied when the caller may not make it.
        """
        self._check_here(context)
        asked = _parsed(f"{kind}SharedMemory{name}Request", request)
        if name == UNREGISTER and not asked.name:  # type: ignore[attr-defined]
            return await self._forget_all(kind, context)
        if name != STATUS:
            _check_theirs(asked)
        answer = await self._made(kind, name, asked, context)
        return _without_ours(kind, answer) if name == STATUS else answer

    def check(self, request: bytes, context: Any) -> None:
        """Raise PermissionDenied for a request that refers to forbidden memory."""
        if not may_refer_to_memory(request):
            return
        asked: Any = _parsed("ModelInferRequest", request)
        for tensor in (*asked.inputs, *asked.outputs):
            if region := tensor.parameters[_PARAMETER].string_param:
                self._check_here(context)
                _check_name(region)

    def _check_here(self, context: Any) -> None:
        if not self._offered:
            raise PermissionDenied(
                "shared memory is not offered here; send tensors in the request, or have the operator set "
                "DEFUSE_SHARED_MEMORY",
                reason="NO_SHARED_MEMORY",
            )
        if not context.peer().startswith(_HERE):
            raise PermissionDenied(
                f"shared memory is for callers on the host of the gateway, and {context.peer()} is on another; send "
                "tensors in the request",
                reason="NOT_ON_THIS_HOST",
            )

    async def _forget_all(self, kind: str, context: Any) -> bytes:
        """Unregister all regions but the services' own.

        Raises the first of Triton's refusals after it has tried all regions.
        """
        ask = getattr(service_pb2, f"{kind}SharedMemoryStatusRequest")()
        status: Any = _parsed(f"{kind}SharedMemoryStatusResponse", await self._made(kind, STATUS, ask, context))
        forget = getattr(service_pb2, f"{kind}SharedMemoryUnregisterRequest")
        refusals = []
        for region in status.regions:
            if not region.startswith(OWN_REGION_PREFIX):
                try:
                    await self._made(kind, UNREGISTER, forget(name=region), context)
                except grpc.aio.AioRpcError as error:  # Triton releases memory a moment after it has answered
                    refusals.append(error)
        if refusals:
            raise refusals[0]
        return b""

    async def _made(self, kind: str, name: str, request: Message, context: Any) -> bytes:
        # Serialized again, so that Triton gets exactly what was checked.
        return await self._call(f"{kind}SharedMemory{name}", request.SerializeToString(), context.time_remaining())


def _parsed(kind: str, data: bytes) -> Message:
    message: Message = getattr(service_pb2, kind)()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidInput(f"the request is no {kind}: {error}", reason="MALFORMED_REQUEST") from error
    return message


def _check_theirs(request: Any) -> None:
    """Raise PermissionDenied for the services' own regions and their files."""
    _check_name(request.name)
    _check_name(getattr(request, "key", "").lstrip("/"))


def _check_name(name: str) -> None:
    if name.startswith(OWN_REGION_PREFIX):
        raise PermissionDenied(
            f"region {name!r} belongs to the services of Defuse; choose a name that does not begin with "
            f"{OWN_REGION_PREFIX!r}",
            reason="REGION_OF_DEFUSE",
        )


def _without_ours(kind: str, answer: bytes) -> bytes:
    status: Any = _parsed(f"{kind}SharedMemoryStatusResponse", answer)
    for region in [name for name in status.regions if name.startswith(OWN_REGION_PREFIX)]:
        del status.regions[region]
    data: bytes = status.SerializeToString()
    return data
