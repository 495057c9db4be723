"""The hook on an event loop."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
from defuse.hooks import AioInterceptor, Monitor
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

from tests.unit.client.hooks.servers import Gateway, asking
from tests.unit.client.hooks.test_monitor import settled

Make = Callable[..., Monitor]


def test_calls_side_by_side(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    """Each is answered and reported; what fails fails for its caller, what is another method is not looked at."""
    monitor = monitored()

    async def story() -> None:
        async with grpc.aio.insecure_channel(classifier_address, interceptors=[AioInterceptor(monitor)]) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            answers = await asyncio.gather(*(stub.ModelInfer(asking(f"a{number}")) for number in range(10)))
            assert [answer.id for answer in answers] == [f"a{number}" for number in range(10)]
            with pytest.raises(grpc.aio.AioRpcError, match="broken"):
                await stub.ModelInfer(asking(model="broken"))
            assert (await stub.ServerLive(oip.ServerLiveRequest())).live

    asyncio.run(asyncio.wait_for(story(), 60))
    assert settled(monitor, 10).stored == 10
    assert set(gateway.stored) == {f"a{number}" for number in range(10)}
