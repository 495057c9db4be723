"""Triton's own client, unchanged, against the gateway: every call of the Open Inference Protocol that it offers."""

import asyncio
import os
import queue
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as system_memory

from services.triton.transport import OWN_REGION_PREFIX
from tests.conftest import eventually
from tests.restartable_triton import CLASSES, SHAPE, Served, asked, images

MODEL = "tiny"
OURS_THERE = f"{OWN_REGION_PREFIX}1-of-a-service"


@pytest.fixture
def client(door: str) -> Iterator[triton.InferenceServerClient]:
    with closing(triton.InferenceServerClient(door)) as client:
        yield client


@pytest.fixture
def direct(served: Served) -> Iterator[triton.InferenceServerClient]:
    """The same client at Triton itself."""
    with closing(triton.InferenceServerClient(served.address)) as client:
        yield client


@pytest.fixture
def names(served: Served) -> tuple[str, str]:
    """Names of the classifier's input and output."""
    return served.model.input_name, served.model.output_name


def test_what_is_told(client: triton.InferenceServerClient, direct: triton.InferenceServerClient) -> None:
    """Server, readiness, metadata, configuration: as Triton says it; the champion is the version that is served."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "champion")
    assert client.get_server_metadata() == direct.get_server_metadata()
    assert client.get_model_metadata(MODEL) == direct.get_model_metadata(MODEL)
    assert client.get_model_config(MODEL, "champion") == direct.get_model_config(MODEL)
    with pytest.raises(InferenceServerException, match="has no challenger"):
        client.get_model_metadata(MODEL, "challenger")


def test_inference(
    client: triton.InferenceServerClient, direct: triton.InferenceServerClient, names: tuple[str, str], door: str
) -> None:
    """Sync, in the background and aio: the same scores; statistics count what was asked."""
    given, taken = names
    batch = images(3)
    before = client.get_inference_statistics(MODEL).model_stats[0].inference_count
    expected = direct.infer(MODEL, asked(batch, given)).as_numpy(taken)
    np.testing.assert_array_equal(client.infer(MODEL, asked(batch, given)).as_numpy(taken), expected)

    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer(MODEL, asked(batch, given), callback=lambda result, error: answers.put(error or result))
    np.testing.assert_array_equal(answers.get(timeout=30).as_numpy(taken), expected)

    async def aio() -> Any:
        async with triton_aio.InferenceServerClient(door) as caller:
            return (await caller.infer(MODEL, asked(batch, given), model_version="champion")).as_numpy(taken)

    np.testing.assert_array_equal(asyncio.run(aio()), expected)

    def counted() -> int:
        return int(client.get_inference_statistics(MODEL, "1").model_stats[0].inference_count) - before

    eventually(lambda: counted() == 12)  # Triton counts after it has answered


def test_a_stream(client: triton.InferenceServerClient, names: tuple[str, str]) -> None:
    """Answers come in order, each to its request; a request that cannot be answered ends nothing but itself."""
    given, taken = names
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(error or result))
    batches = {f"batch-{seed}": images(2, seed=seed) for seed in range(5)}
    for request_id, batch in batches.items():
        client.async_stream_infer(MODEL, asked(batch, given), request_id=request_id, model_version="champion")
    for request_id, batch in batches.items():
        answer = answers.get(timeout=30)
        assert answer.get_response().id == request_id
        np.testing.assert_allclose(
            answer.as_numpy(taken), client.infer(MODEL, asked(batch, given)).as_numpy(taken), atol=1e-5
        )
    client.async_stream_infer(MODEL, asked(images(1), given), model_version="challenger")
    assert "has no challenger" in str(answers.get(timeout=30))
    client.async_stream_infer(MODEL, asked(images(1), given), request_id="after")
    assert answers.get(timeout=30).get_response().id == "after"
    client.stop_stream()


def test_an_aio_stream(door: str, names: tuple[str, str]) -> None:
    given, taken = names

    async def story() -> list[tuple[int, ...]]:
        async def requests() -> Any:
            for seed in range(3):
                yield {"model_name": MODEL, "inputs": asked(images(2, seed=seed), given)}

        async with triton_aio.InferenceServerClient(door) as client:
            answers = client.stream_infer(requests())
            return [error or result.as_numpy(taken).shape async for result, error in answers]

    assert asyncio.run(story()) == [(2, len(CLASSES))] * 3


def forgotten(client: triton.InferenceServerClient) -> bool:
    """Have all memory forgotten; say whether it was: Triton lets go of it a moment after it has answered."""
    try:
        client.unregister_system_shared_memory()
    except InferenceServerException:
        return False
    return True


def test_system_shared_memory(client: triton.InferenceServerClient, names: tuple[str, str]) -> None:
    """Registered, listed, read from and written to, and forgotten, all through the gateway."""
    given, taken = names
    batch = images(2)
    expected = client.infer(MODEL, asked(batch, given)).as_numpy(taken)
    input_, output = (
        system_memory.create_shared_memory_region(name, f"/{name}-{os.getpid()}", size)
        for name, size in (("theirs-in", batch.nbytes), ("theirs-out", expected.nbytes))
    )
    try:
        system_memory.set_shared_memory_region(input_, [batch])
        client.register_system_shared_memory("theirs-in", f"/theirs-in-{os.getpid()}", batch.nbytes)
        client.register_system_shared_memory("theirs-out", f"/theirs-out-{os.getpid()}", expected.nbytes)
        tensor = triton.InferInput(given, list(batch.shape), "FP32")
        tensor.set_shared_memory("theirs-in", batch.nbytes)
        wanted = triton.InferRequestedOutput(taken)
        wanted.set_shared_memory("theirs-out", expected.nbytes)
        client.infer(MODEL, [tensor], outputs=[wanted])
        np.testing.assert_array_equal(
            system_memory.get_contents_as_numpy(output, np.float32, list(expected.shape)), expected
        )
        assert {"theirs-in", "theirs-out"} <= set(client.get_system_shared_memory_status().regions)
    finally:
        eventually(lambda: forgotten(client))
        for region in (input_, output):
            system_memory.destroy_shared_memory_region(region)
    assert not {"theirs-in", "theirs-out"} & set(client.get_system_shared_memory_status().regions)


def test_memory_of_the_services_is_left_alone(
    client: triton.InferenceServerClient, direct: triton.InferenceServerClient
) -> None:
    """A caller neither takes nor forgets a region of theirs, also not when he forgets all."""
    region = system_memory.create_shared_memory_region(OURS_THERE, f"/{OURS_THERE}", 64)
    try:
        direct.register_system_shared_memory(OURS_THERE, f"/{OURS_THERE}", 64)
        client.unregister_system_shared_memory()
        assert OURS_THERE in direct.get_system_shared_memory_status().regions
        with pytest.raises(InferenceServerException, match="belongs to the services"):
            client.unregister_system_shared_memory(OURS_THERE)
        with pytest.raises(InferenceServerException, match="belongs to the services"):
            client.register_system_shared_memory("mine", f"/{OURS_THERE}", 64)
        assert OURS_THERE not in client.get_system_shared_memory_status().regions
    finally:
        direct.unregister_system_shared_memory(OURS_THERE)
        system_memory.destroy_shared_memory_region(region)


def test_images_of_another_shape(client: triton.InferenceServerClient, names: tuple[str, str]) -> None:
    """Triton's words reach the caller."""
    with pytest.raises(InferenceServerException, match="shape") as refused:
        client.infer(MODEL, asked(np.zeros((1, *SHAPE[:2], 3), np.float32), names[0]))
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
