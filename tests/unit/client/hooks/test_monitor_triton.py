"""Monitors in clients of tritonclient."""

import asyncio
import queue
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from defuse.errors import InvalidInput
from defuse.hooks import Monitor, watch
from tritonclient.utils import InferenceServerException

from tests.unit.client.hooks.servers import MODEL, Gateway
from tests.unit.client.hooks.test_monitor import wait_until_settled

Make = Callable[..., Monitor]
IMAGE = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)


def inputs() -> list[Any]:
    tensor = triton.InferInput("image", [1, 1, 2, 2], "FP32")
    tensor.set_data_from_numpy(IMAGE)
    return [tensor]


def test_blocking_client(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    """`infer` and `async_infer` are reported; errors and other methods are unchanged."""
    monitor = monitored()
    with closing(triton.InferenceServerClient(classifier_address)) as client:
        assert watch(client, monitor) is client
        assert client.infer(MODEL, inputs(), request_id="sync").as_numpy("scores").tolist() == [[0, 1, 2]]
        responses: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            MODEL,
            inputs(),
            request_id="async",
            callback=lambda result, error: responses.put(error or result),
        )
        assert responses.get(timeout=60).as_numpy("scores").tolist() == [[0, 1, 2]]
        with pytest.raises(InferenceServerException, match="broken"):
            client.infer("broken", inputs())
        assert client.is_server_live()
    assert wait_until_settled(monitor, 2).stored == 2
    assert set(gateway.stored) == {"sync", "async"}
    assert gateway.observation("sync").input == IMAGE.tobytes()


def test_client_on_an_event_loop(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    monitor = monitored()

    async def scenario() -> None:
        async with triton_aio.InferenceServerClient(classifier_address) as client:
            watch(client, monitor)
            responses = await asyncio.gather(*(client.infer(MODEL, inputs(), request_id=f"a{i}") for i in range(4)))
            assert all(response.as_numpy("scores").tolist() == [[0, 1, 2]] for response in responses)
            with pytest.raises(InferenceServerException, match="broken"):
                await client.infer("broken", inputs())
            assert await client.is_server_live()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert wait_until_settled(monitor, 4).stored == 4
    assert set(gateway.stored) == {f"a{number}" for number in range(4)}


def test_other_objects(monitored: Make) -> None:
    """The error names the other ways to hook in."""
    with pytest.raises(InvalidInput, match=r"object is not an InferenceServerClient.*intercept_channel"):
        watch(object(), monitored())
