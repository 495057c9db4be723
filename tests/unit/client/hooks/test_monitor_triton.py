"""Triton's own clients with a hook in them."""

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
from tests.unit.client.hooks.test_monitor import settled

Make = Callable[..., Monitor]
IMAGE = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)


def inputs() -> list[Any]:
    tensor = triton.InferInput("image", [1, 1, 2, 2], "FP32")
    tensor.set_data_from_numpy(IMAGE)
    return [tensor]


def test_the_blocking_client(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    """`infer` and `async_infer` are seen, errors are Triton's own, everything else is as it was."""
    monitor = monitored()
    with closing(triton.InferenceServerClient(classifier_address)) as client:
        assert watch(client, monitor) is client
        assert client.infer(MODEL, inputs(), request_id="sync").as_numpy("scores").tolist() == [[0, 1, 2]]
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            MODEL,
            inputs(),
            request_id="async",
            callback=lambda result, error: answers.put(error or result),
        )
        assert answers.get(timeout=60).as_numpy("scores").tolist() == [[0, 1, 2]]
        with pytest.raises(InferenceServerException, match="broken"):
            client.infer("broken", inputs())
        assert client.is_server_live()
    assert settled(monitor, 2).stored == 2
    assert set(gateway.stored) == {"sync", "async"}
    assert gateway.observation("sync").input == IMAGE.tobytes()


def test_the_client_on_an_event_loop(monitored: Make, classifier_address: str, gateway: Gateway) -> None:
    monitor = monitored()

    async def story() -> None:
        async with triton_aio.InferenceServerClient(classifier_address) as client:
            watch(client, monitor)
            answers = await asyncio.gather(*(client.infer(MODEL, inputs(), request_id=f"a{i}") for i in range(4)))
            assert all(answer.as_numpy("scores").tolist() == [[0, 1, 2]] for answer in answers)
            with pytest.raises(InferenceServerException, match="broken"):
                await client.infer("broken", inputs())
            assert await client.is_server_live()

    asyncio.run(asyncio.wait_for(story(), 60))
    assert settled(monitor, 4).stored == 4
    assert set(gateway.stored) == {f"a{number}" for number in range(4)}


def test_what_is_no_such_client(monitored: Make) -> None:
    """It is said with the other ways to hook in."""
    with pytest.raises(InvalidInput, match=r"object is not an InferenceServerClient.*intercept_channel"):
        watch(object(), monitored())
