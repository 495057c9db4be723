"""The interceptor for channels on an event loop."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from defuse.hooks import AioInterceptor, Monitor
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from tests.unit.client.hooks.servers import Gateway, infer_request
from tests.unit.client.hooks.test_monitor import wait_until_settled

Make = Callable[..., Monitor]


def test_concurrent_calls(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    """Each call is reported; failed calls raise, other methods are ignored."""
    monitor = monitored()

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(classifier_address, interceptors=[AioInterceptor(monitor)]) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            responses = await asyncio.gather(*(stub.ModelInfer(infer_request(f"a{number}")) for number in range(10)))
            assert [response.id for response in responses] == [f"a{number}" for number in range(10)]
            with pytest.raises(grpc.aio.AioRpcError, match="broken"):
                await stub.ModelInfer(infer_request(model="broken"))
            assert (await stub.ServerLive(oip.ServerLiveRequest())).live

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert wait_until_settled(monitor, 10).stored == 10
    assert set(gateway.stored) == {f"a{number}" for number in range(10)}
