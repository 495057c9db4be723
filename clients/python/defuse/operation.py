"""What takes long, in the hands of a program that waits."""

from collections.abc import Callable

from defuse.blocking import perform
from defuse.calls import operations as calls
from defuse.connection import Connection
from defuse.values import OperationStatus


class Operation:
    """A search, a correction or a release at a gateway; `status` is what was last heard of it."""

    def __init__(self, connection: Connection, status: OperationStatus) -> None:
        self._connection = connection
        self.status = status

    def __repr__(self) -> str:
        return f"<Operation {self.name}: {self.status.state}>"

    @property
    def name(self) -> str:
        return self.status.name

    def wait(
        self, *, timeout_s: float | None = None, on_progress: Callable[[OperationStatus], None] = lambda _: None
    ) -> OperationStatus:
        """Wait until it has ended and return its status; raise DeadlineExceeded after `timeout_s` seconds."""
        waiting = calls.wait_for_operation(self.name, timeout_s=timeout_s, on_progress=on_progress)
        self.status = perform(self._connection, waiting)
        return self.status

    def cancel(self) -> None:
        """Stop what it does; no effect on one that has ended, NotReady for a release."""
        perform(self._connection, calls.cancel_operation(self.name))

    def delete(self) -> None:
        """Forget it, not what it gave; raise NotReady while it has not ended."""
        perform(self._connection, calls.delete_operation(self.name))
