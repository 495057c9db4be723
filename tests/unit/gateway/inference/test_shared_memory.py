"""Shared memory through the door: for whom, and never that of the services, however the request is written."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from defuse.errors import InvalidInput, PermissionDenied
from tritonclient.grpc import service_pb2

from services.gateway.inference.shared_memory import SharedMemory
from services.triton.transport import OWN_REGION_PREFIX

HERE, ELSEWHERE = "ipv4:127.0.0.1:5", "ipv4:172.17.0.1:5"


@dataclass(frozen=True)
class Caller:
    """The gateway's view of a caller."""

    where: str = HERE

    def peer(self) -> str:
        return self.where

    def time_remaining(self) -> float:
        return 3.0


@dataclass
class Triton:
    """Remembers what it was asked."""

    asked: list[tuple[str, bytes]] = field(default_factory=list)
    status: Any = b""

    async def call(self, name: str, request: bytes, seconds: float | None) -> bytes:
        self.asked.append((name, request))
        return self.status if name.endswith("Status") else b""


def answer(memory: SharedMemory, kind: str, name: str, request: bytes, caller: Caller | None = None) -> bytes:
    return asyncio.run(memory.answer(kind, name, request, caller or Caller()))


def register(name: str, key: str = "/theirs") -> bytes:
    data: bytes = service_pb2.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=8).SerializeToString()
    return data


def infer(region: str) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[b"shared_memory_region"])
    request.inputs.add(name="image").parameters["shared_memory_region"].string_param = region
    data: bytes = request.SerializeToString()
    return data


@pytest.mark.parametrize("caller", [Caller(), Caller("ipv6:%5B::1%5D:7"), Caller("unix:")])
def test_a_caller_of_this_host(caller: Caller) -> None:
    """The forwarded calls reach Triton."""
    triton = Triton()
    answer(SharedMemory(triton.call, offered=True), "System", "Register", register("theirs"), caller)
    assert triton.asked == [("SystemSharedMemoryRegister", register("theirs"))]


@pytest.mark.parametrize(("offered", "caller"), [(False, Caller()), (True, Caller(ELSEWHERE))])
def test_who_may_not(offered: bool, caller: Caller) -> None:
    """Neither register, nor refer to memory in a request for inference; tensors in a request are let through."""
    triton = Triton()
    memory = SharedMemory(triton.call, offered=offered)
    with pytest.raises(PermissionDenied):
        answer(memory, "System", "Register", register("theirs"), caller)
    with pytest.raises(PermissionDenied):
        memory.check(infer("theirs"), caller)
    memory.check(infer(""), caller)
    request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[b"shared_memory_region"])
    memory.check(request.SerializeToString(), caller)
    assert triton.asked == []


@pytest.mark.parametrize(
    "request_",
    [
        register(f"{OWN_REGION_PREFIX}1"),
        register("theirs", key=f"/{OWN_REGION_PREFIX}1"),
        register("theirs") + register(f"{OWN_REGION_PREFIX}1"),  # the last value of a field counts
        b"\x50\x01" + register(f"{OWN_REGION_PREFIX}1"),  # a field that nobody knows comes first
    ],
)
def test_what_belongs_to_the_services(request_: bytes) -> None:
    triton = Triton()
    with pytest.raises(PermissionDenied, match="belongs to the services"):
        answer(SharedMemory(triton.call, offered=True), "System", "Register", request_)
    assert triton.asked == []


def test_a_request_for_inference_refers_to_a_region_of_the_services() -> None:
    memory = SharedMemory(Triton().call, offered=True)
    memory.check(infer("theirs"), Caller())
    with pytest.raises(PermissionDenied, match="belongs to the services"):
        memory.check(infer(f"{OWN_REGION_PREFIX}1"), Caller())


def test_a_cuda_handle_is_any_bytes() -> None:
    triton = Triton()
    request = service_pb2.CudaSharedMemoryRegisterRequest(name="theirs", raw_handle=b"\xff\xfe\x00", byte_size=8)
    answer(SharedMemory(triton.call, offered=True), "Cuda", "Register", request.SerializeToString())
    assert triton.asked == [("CudaSharedMemoryRegister", request.SerializeToString())]


def test_the_services_are_not_told_of_nor_forgotten() -> None:
    """Status leaves out what is theirs, and who forgets all forgets the others."""
    status = service_pb2.SystemSharedMemoryStatusResponse()
    for name in (f"{OWN_REGION_PREFIX}1", "theirs"):
        status.regions[name].name = name
    triton = Triton(status=status.SerializeToString())
    memory = SharedMemory(triton.call, offered=True)
    told = service_pb2.SystemSharedMemoryStatusResponse.FromString(answer(memory, "System", "Status", b""))
    assert set(told.regions) == {"theirs"}
    answer(memory, "System", "Unregister", b"")
    forgotten = [
        service_pb2.SystemSharedMemoryUnregisterRequest.FromString(request).name
        for name, request in triton.asked
        if name == "SystemSharedMemoryUnregister"
    ]
    assert forgotten == ["theirs"]


def test_bytes_that_are_no_request() -> None:
    with pytest.raises(InvalidInput, match="SystemSharedMemoryRegisterRequest"):
        answer(SharedMemory(Triton().call, offered=True), "System", "Register", b"\xff\xff")
