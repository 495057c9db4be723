"""Requests at a steady rate from a process of their own, whatever becomes of the answers."""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton

from benchmarks.stand import Array

# After this an answer counts as failed.
_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request: when it was sent (monotonic seconds), how long it took, and who answered, or why nobody did."""

    sent: float
    took: float
    model: str = ""
    version: str = ""
    error: str = ""


@dataclass(kw_only=True)
class Load:
    """Requests to one address and their answers; complete when the block of `steady` has ended."""

    door: str
    answers: list[Answer] = field(default_factory=list)

    def between(self, begin: float, end: float) -> list[Answer]:
        """Return the answers to what was sent in a span of time."""
        return [answer for answer in self.answers if begin <= answer.sent < end]

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error]


@contextmanager
def steady(door: str, address: str, model: str, image: Array, *, rate: float) -> Iterator[Load]:
    """Send an image (1, c, h, w) `rate` times a second, without a version, as long as the block runs."""
    load = Load(door=door)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(theirs, address, model, image, rate))
    process.start()
    ours.recv()  # the first answer: connected
    try:
        yield load
    finally:
        ours.send("stop")
        load.answers.extend(ours.recv())
        process.join()


def _process(pipe: Connection, address: str, model: str, image: Array, rate: float) -> None:
    pipe.send(asyncio.run(_send(pipe, address, model, image, rate)))


async def _send(pipe: Connection, address: str, model: str, image: Array, rate: float) -> list[Answer]:
    async with triton.InferenceServerClient(address) as client:
        metadata = await client.get_model_metadata(model)
        given = triton.InferInput(metadata.inputs[0].name, list(image.shape), "FP32")
        given.set_data_from_numpy(np.ascontiguousarray(image, np.float32))
        await client.infer(model, [given])
        pipe.send("connected")
        tasks, begin, count = [], time.monotonic(), 0
        while not pipe.poll():
            tasks.append(asyncio.create_task(_ask(client, model, given)))
            count += 1
            await asyncio.sleep(max(0.0, begin + count / rate - time.monotonic()))
        return list(await asyncio.gather(*tasks))


async def _ask(client: Any, model: str, given: Any) -> Answer:
    sent = time.monotonic()
    try:
        answer = (await client.infer(model, [given], client_timeout=_DEADLINE_S)).get_response()
    except Exception as error:  # noqa: BLE001  # whatever a caller would see
        return Answer(sent=sent, took=time.monotonic() - sent, error=str(error))
    return Answer(sent=sent, took=time.monotonic() - sent, model=answer.model_name, version=answer.model_version)
