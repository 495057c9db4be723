"""The client of the gateway for programs with an event loop.

>>> from defuse.aio import Client
>>> async def main() -> None:  # doctest: +SKIP
...     async with Client() as client:
...         async for batch in client.failures("first"):
...             print(len(batch.failures))
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Self, TypeVar

import grpc

from defuse.calls import runs
from defuse.calls.sans_io import BlockingWork, CurrentUser, Rpc, SansIoCall, Sleep, Step, StreamRpc
from defuse.connection import CHANNEL_OPTIONS, Credentials, find_gateway, find_method, make_stubs, reconnect_delay_s
from defuse.errors import from_rpc_error
from defuse.methods import AsyncClientMethods, AsyncLatentSpaceMethods
from defuse.tls import TlsFiles, open_channel
from defuse.values import OperationStatus

__all__ = ["Client", "LatentSpace", "Operation"]

T = TypeVar("T")


class Client(AsyncClientMethods):
    """The client of a gateway on an event loop.

    Use it in `async with`, or await `close`. It has the methods of `defuse.Client`: calls are awaited, streams are read
    by `async for`. Callbacks such as `on_change` are plain functions, called on the event loop.

    Args:
        address: HOST:PORT of the gateway. By default `DEFUSE_GATEWAY`, else the local
            stack of `defuse up`.
        timeout_s: Deadline of short calls, in seconds.
        token: Bearer token, for gateways that require one. By default `DEFUSE_TOKEN`,
            else the content of the file `DEFUSE_TOKEN_FILE`.

    Every method raises a subclass of DefuseError: see `defuse.errors`.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0, token: str | None = None) -> None:
        self._connection = _Connection(address or find_gateway(), timeout_s=timeout_s, token=token)
        self.address = self._connection.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    def latent_space(self, run_id: str) -> "LatentSpace":
        """Return the latent space of a run: encode, decode, interpolate."""
        return LatentSpace(self._connection, run_id)

    async def operation(self, name: str) -> "Operation":
        """Return a long-running operation by its name.

        `Run.operation` and `Correction.operation` are such names.
        """
        return Operation(self._connection, await execute_call(self._connection, runs.operation(name)))

    async def operations(self, run_id: str = "", *, model: str = "", done: bool | None = None) -> "list[Operation]":
        """Return operations of a run, a model or all runs, newest first.

        The operations of a run are its search and its corrections, and those of a model its releases. `done` selects
        finished or unfinished operations; None returns both.
        """
        statuses = await execute_call(self._connection, runs.operations(run_id, model=model, done=done))
        return [Operation(self._connection, status) for status in statuses]

    async def _execute_call(self, call: SansIoCall[T]) -> T:
        return await execute_call(self._connection, call)

    def _read_stream(self, stream: StreamRpc[T]) -> AsyncGenerator[T, None]:
        return read_stream(self._connection, stream)


class LatentSpace(AsyncLatentSpaceMethods):
    """The latent space of a run: its VAE as functions of arrays.

    One call takes at most 1 MiB of images. Raises NotReady until the VAE is trained, and InvalidInput for images or
    latents of a wrong shape.
    """

    def __init__(self, connection: "_Connection", run_id: str) -> None:
        self._connection = connection
        self.run_id = run_id

    async def _execute_call(self, call: SansIoCall[T]) -> T:
        return await execute_call(self._connection, call)


class Operation:
    """A long-running operation: a search, a correction or a release.

    `status` is the last known status.
    """

    def __init__(self, connection: "_Connection", status: OperationStatus) -> None:
        self._connection = connection
        self.status = status

    def __repr__(self) -> str:
        return f"<Operation {self.name}: {self.status.state}>"

    @property
    def name(self) -> str:
        """Return the resource name, such as `runs/{run}/operations/{operation}`."""
        return self.status.name

    async def wait(
        self, *, timeout_s: float | None = None, on_progress: Callable[[OperationStatus], None] = lambda _: None
    ) -> OperationStatus:
        """Wait for the end of the operation and return its status.

        Raises DeadlineExceeded after `timeout_s` seconds; the operation continues.
        """
        waiting = runs.wait_for_operation(self.name, timeout_s=timeout_s, on_progress=on_progress)
        self.status = await execute_call(self._connection, waiting)
        return self.status

    async def cancel(self) -> None:
        """Cancel the operation; a finished one stays as it is.

        Raises NotReady for a release.
        """
        await execute_call(self._connection, runs.cancel_operation(self.name))

    async def delete(self) -> None:
        """Delete the operation, but not its result.

        Raises NotReady before its end.
        """
        await execute_call(self._connection, runs.delete_operation(self.name))


class _Connection:
    """A gRPC connection to a gateway for programs with an event loop.

    It is the counterpart of `defuse.connection.Connection`.
    """

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self.credentials = Credentials(token, address)
        self._timeout_s = timeout_s
        self._channel = open_channel(grpc.aio, address, TlsFiles.of_environment(), options=CHANNEL_OPTIONS)
        self._stubs = make_stubs(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the response to a request or to an iterator of requests.

        Raises a DefuseError.
        """
        try:
            return await find_method(self._stubs, method)(
                request, timeout=timeout_s or self._timeout_s, metadata=self.credentials.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=self.address) from error

    async def watch(self, method: str, request: Any, timeout_s: float | None) -> AsyncGenerator[Any, None]:
        """Yield the messages of a stream; reconnect after connection losses.

        It reconnects while the gateway or Redis is unavailable. Each attempt sends the current state of `request`, so
        that a reader can resume. Raises DeadlineExceeded after `timeout_s` seconds.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = max(0.0, end - time.monotonic())
            call = find_method(self._stubs, method)(
                request, timeout=None if timeout_s is None else left, metadata=self.credentials.metadata()
            )
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(reconnect_delay_s(error, self.address, method, timeout_s=timeout_s, end=end))
            else:
                return
            finally:
                call.cancel()  # the reader may stop before the end


async def execute_call(connection: _Connection, call: SansIoCall[T]) -> T:
    """Execute a call step by step and return its value."""
    result: Any = None
    raised: BaseException | None = None
    while True:
        try:
            step = call.throw(raised) if raised else call.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        result, raised = None, None
        try:
            result = await _execute_step(connection, step)
        except BaseException as error:  # noqa: BLE001  # the call cleans up, then handles or raises it
            raised = error


async def read_stream(connection: _Connection, stream: StreamRpc[T]) -> AsyncGenerator[T, None]:
    """Yield the parsed messages of a stream as they arrive."""
    try:
        async with aclosing(connection.watch(stream.method, stream.request, stream.timeout_s)) as responses:
            async for response in responses:
                yield stream.parse(response)
    except GeneratorExit:
        if stream.on_early_close:
            await execute_call(connection, stream.on_early_close())
        raise


async def _execute_step(connection: _Connection, step: Step) -> Any:
    if isinstance(step, Rpc):
        return await connection.call(step.method, step.request, timeout_s=step.timeout_s)
    if isinstance(step, BlockingWork):
        return await asyncio.to_thread(step.function)
    if isinstance(step, CurrentUser):
        return connection.credentials.user()
    if isinstance(step, Sleep):
        return await asyncio.sleep(step.seconds)
    last = None
    async for value in read_stream(connection, step):
        last = value
    return last
