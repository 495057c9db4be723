"""Calls to a gateway that may be absent, slow, refusing or restarting: made again until they are answered."""

import threading
from collections.abc import Callable
from typing import Any

import grpc

from defuse.bearer import Bearer
from defuse.errors import InvalidInput, from_rpc_error
from defuse.hooks.buffer import CLOSED
from defuse.hooks.complaints import Complaints
from defuse.hooks.drops import Dropped
from defuse.tls import TlsFiles, open_channel
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc

_DEADLINE_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
# Where trying again gives the same answer. Everything else may be over in a moment: a gateway that restarts, that is
# overloaded, whose store is full or that is not there yet.
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
# By itself gRPC would look for a server that was long away only every two minutes.
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 5000))


class Courier:
    """Reports to one gateway, with one call at a time; nothing is opened before the first."""

    def __init__(self, gateway: str, bearer: Bearer, complaints: Complaints) -> None:
        self._gateway = gateway
        self._bearer = bearer
        self._complaints = complaints
        self._channel: grpc.Channel | None = None
        self._opening = threading.Lock()
        self._hurried = threading.Event()
        self._stopped = threading.Event()

    def report(self, requests: list[pb.ReportRequest]) -> int:
        """Report a batch; return how many of its observations are stored. Raises Dropped where it is given up."""
        return int(self._carry(lambda stub: stub.Report.future, lambda: iter(requests)).stored)

    def attach(self, request: pb.AttachTruthRequest) -> int:
        """Say what observations show; return how many are known. Raises Dropped where it is given up."""
        return int(self._carry(lambda stub: stub.AttachTruth.future, lambda: request).attached)

    def hurry(self) -> None:
        """Try once more at once whatever waits for its next attempt."""
        self._hurried.set()

    def stop(self) -> None:
        """Give up what is under way, and all that comes."""
        self._stopped.set()
        with self._opening:
            if self._channel:
                self._channel.close()

    def _carry(self, method: Callable[[Any], Any], request: Callable[[], Any]) -> Any:
        pause_s = _FIRST_PAUSE_S
        while not self._stopped.is_set():
            try:
                call = method(self._stub())
                return call(request(), timeout=_DEADLINE_S, metadata=self._bearer.metadata()).result()
            except (grpc.FutureCancelledError, ValueError):  # gRPC's for a call, and for one on a closed channel
                if not self._stopped.is_set():
                    raise
                continue
            except grpc.RpcError as error:
                self._look_at(error)
            (self._stopped if self._hurried.is_set() else self._hurried).wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise Dropped(CLOSED, "the monitor was closed before the gateway had taken everything")

    def _look_at(self, error: Any) -> None:
        """Say what went wrong; raise Dropped where it goes wrong the next time, too."""
        reason = error.code().name.lower()
        if error.code() in _REFUSALS:
            about = from_rpc_error(error, address=self._gateway).metadata.get("id", "")
            refusal = f"the gateway at {self._gateway} refuses what is reported ({error.details()})"
            raise Dropped(reason, refusal, about=about)
        if not self._stopped.is_set():
            self._complaints.say(
                reason, f"the gateway at {self._gateway} takes no reports ({error.details()}), they wait"
            )

    def _stub(self) -> Any:
        with self._opening:
            if self._channel is None:
                self._channel = self._open()
            return pb_grpc.MonitorServiceStub(self._channel)

    def _open(self) -> grpc.Channel:
        """Return a channel; raise Dropped while the files that TLS needs cannot be read."""
        try:
            channel: grpc.Channel = open_channel(grpc, self._gateway, TlsFiles.of_environment(), options=_OPTIONS)
        except InvalidInput as error:
            raise Dropped("bad_tls", error.message) from error
        return channel
