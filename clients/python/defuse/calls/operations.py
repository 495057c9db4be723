"""What takes long, by google.longrunning.Operations."""

import math
import time
from collections.abc import Callable

from google.longrunning import operations_proto_pb2 as pb

from defuse import names
from defuse.calls.pages import listed
from defuse.errors import DeadlineExceeded, Unavailable
from defuse.steps import Call, Pause, Steps
from defuse.values import OperationStatus

# For so long one call waits; then the progress is told.
_TURN_S = 2.0
_ANSWER_S = 10.0
_RECONNECT_S = 1.0


def operation(name: str) -> Steps[OperationStatus]:
    """Return an operation as it stands."""
    answer = yield Call(method="GetOperation", request=pb.GetOperationRequest(name=name))
    return OperationStatus.from_proto(answer)


def operations(run_id: str = "", *, model: str = "", done: bool | None = None) -> Steps[list[OperationStatus]]:
    """Return the operations of a run, of all runs, newest first, or the releases of a model; `done` says which."""
    wanted = "" if done is None else f"done={str(done).lower()}"
    parent = names.model(model) if model else names.run(run_id) if run_id else ""
    request = pb.ListOperationsRequest(name=parent, filter=wanted)
    return [
        OperationStatus.from_proto(message) for message in (yield from listed("ListOperations", request, "operations"))
    ]


def wait_for_operation(
    name: str, *, timeout_s: float | None = None, on_progress: Callable[[OperationStatus], None] = lambda _: None
) -> Steps[OperationStatus]:
    """Wait until an operation has ended and return it as it then is; lost connections are made again.

    Raises DeadlineExceeded after `timeout_s` seconds; what it waits for goes on.
    """
    end = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        turn_s = max(0.0, min(_TURN_S, end - time.monotonic()))
        request = pb.WaitOperationRequest(name=name)
        request.timeout.FromNanoseconds(round(turn_s * 1e9))
        try:
            status = OperationStatus.from_proto(
                (yield Call(method="WaitOperation", request=request, timeout_s=turn_s + _ANSWER_S))
            )
        except Unavailable:
            if time.monotonic() >= end:
                raise
            yield Pause(seconds=min(_RECONNECT_S, max(0.0, end - time.monotonic())))
            continue
        on_progress(status)
        if status.ended:
            return status
        if time.monotonic() >= end:
            raise DeadlineExceeded(f"{name} had not ended after {timeout_s:g} s; it goes on: ask again, or wait longer")


def cancel_operation(name: str) -> Steps[None]:
    """Stop what an operation does; no effect on one that has ended."""
    yield Call(method="CancelOperation", request=pb.CancelOperationRequest(name=name))


def delete_operation(name: str) -> Steps[None]:
    """Forget an operation that has ended, not what it gave; raise NotReady for one that has not."""
    yield Call(method="DeleteOperation", request=pb.DeleteOperationRequest(name=name))
