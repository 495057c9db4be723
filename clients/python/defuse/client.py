"""The client of the gateway for programs that block."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from defuse.calls import runs
from defuse.calls.sans_io import BlockingWork, CurrentUser, Rpc, SansIoCall, Sleep, Step, StreamRpc
from defuse.connection import Connection, find_gateway
from defuse.methods import ClientMethods, LatentSpaceMethods
from defuse.values import OperationStatus

T = TypeVar("T")


class Client(ClientMethods):
    """The client of a gateway.

    Use it as a context manager, or call `close`. Each call of the gateway is a method; `defuse.aio.Client` has the same
    methods for event loops.

    Args:
        address: HOST:PORT of the gateway. By default `DEFUSE_GATEWAY`, else the local
            stack of `defuse up`.
        timeout_s: Deadline of short calls, in seconds.
        token: Bearer token, for gateways that require one. By default `DEFUSE_TOKEN`,
            else the content of the file `DEFUSE_TOKEN_FILE`.

    Every method raises a subclass of DefuseError: see `defuse.errors`.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0, token: str | None = None) -> None:
        self._connection = Connection(address or find_gateway(), timeout_s=timeout_s, token=token)
        self.address = self._connection.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def latent_space(self, run_id: str) -> "LatentSpace":
        """Return the latent space of a run: encode, decode, interpolate."""
        return LatentSpace(self._connection, run_id)

    def operation(self, name: str) -> "Operation":
        """Return a long-running operation by its name.

        `Run.operation` and `Correction.operation` are such names.
        """
        return Operation(self._connection, execute_call(self._connection, runs.operation(name)))

    def operations(self, run_id: str = "", *, model: str = "", done: bool | None = None) -> "list[Operation]":
        """Return operations of a run, a model or all runs, newest first.

        The operations of a run are its search and its corrections, and those of a model its releases. `done` selects
        finished or unfinished operations; None returns both.
        """
        statuses = execute_call(self._connection, runs.operations(run_id, model=model, done=done))
        return [Operation(self._connection, status) for status in statuses]

    def _execute_call(self, call: SansIoCall[T]) -> T:
        return execute_call(self._connection, call)

    def _read_stream(self, stream: StreamRpc[T]) -> Iterator[T]:
        return read_stream(self._connection, stream)


class LatentSpace(LatentSpaceMethods):
    """The latent space of a run: its VAE as functions of arrays.

    One call takes at most 1 MiB of images. Raises NotReady until the VAE is trained, and InvalidInput for images or
    latents of a wrong shape.
    """

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection = connection
        self.run_id = run_id

    def _execute_call(self, call: SansIoCall[T]) -> T:
        return execute_call(self._connection, call)


class Operation:
    """A long-running operation: a search, a correction or a release.

    `status` is the last known status.
    """

    def __init__(self, connection: Connection, status: OperationStatus) -> None:
        self._connection = connection
        self.status = status

    def __repr__(self) -> str:
        return f"<Operation {self.name}: {self.status.state}>"

    @property
    def name(self) -> str:
        """Return the resource name, such as `runs/{run}/operations/{operation}`."""
        return self.status.name

    def wait(
        self, *, timeout_s: float | None = None, on_progress: Callable[[OperationStatus], None] = lambda _: None
    ) -> OperationStatus:
        """Wait for the end of the operation and return its status.

        Raises DeadlineExceeded after `timeout_s` seconds; the operation continues.
        """
        waiting = runs.wait_for_operation(self.name, timeout_s=timeout_s, on_progress=on_progress)
        self.status = execute_call(self._connection, waiting)
        return self.status

    def cancel(self) -> None:
        """Cancel the operation; a finished one stays as it is.

        Raises NotReady for a release.
        """
        execute_call(self._connection, runs.cancel_operation(self.name))

    def delete(self) -> None:
        """Delete the operation, but not its result.

        Raises NotReady before its end.
        """
        execute_call(self._connection, runs.delete_operation(self.name))


def execute_call(connection: Connection, call: SansIoCall[T]) -> T:
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
            result = _execute_step(connection, step)
        except BaseException as error:  # noqa: BLE001  # the call cleans up, then handles or raises it
            raised = error


def read_stream(connection: Connection, stream: StreamRpc[T]) -> Iterator[T]:
    """Yield the parsed messages of a stream as they arrive."""
    try:
        for response in connection.watch(stream.method, stream.request, stream.timeout_s):
            yield stream.parse(response)
    except GeneratorExit:
        if stream.on_early_close:
            execute_call(connection, stream.on_early_close())
        raise


def _execute_step(connection: Connection, step: Step) -> Any:
    if isinstance(step, Rpc):
        return connection.call(step.method, step.request, timeout_s=step.timeout_s)
    if isinstance(step, BlockingWork):
        return step.function()
    if isinstance(step, CurrentUser):
        return connection.credentials.user()
    if isinstance(step, Sleep):
        return time.sleep(step.seconds)
    last = None
    for value in read_stream(connection, step):
        last = value
    return last
