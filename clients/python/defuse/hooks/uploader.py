"""Uploads to a gateway, retried until it responds, and a throttled log."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from defuse.connection import Credentials
from defuse.errors import InvalidInput, from_rpc_error
from defuse.hooks.buffer import CLOSED, Dropped
from defuse.tls import TlsFiles, open_channel
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc

_LOGGER = logging.getLogger("defuse.hooks")
_LOG_INTERVAL_S = 60.0
_DEADLINE_S = 30.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
# A retry gives the same response. All other codes are temporary: a gateway that restarts, is overloaded or absent, or
# whose store is full.
_PERMANENT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
# By default gRPC reconnects to a long absent server only every two minutes.
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 5000))


class ThrottledLog:
    """A log with at most one warning per reason and minute.

    Errors, which are defects, are logged once.
    """

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}

    def warn(self, reason: str, message: str) -> None:
        """Log a warning, at most once per reason and minute."""
        now = time.monotonic()
        if now - self._last_s.get(reason, -math.inf) >= _LOG_INTERVAL_S:
            self._last_s[reason] = now
            _LOGGER.warning("%s: %s; monitor.counts has the number", reason, message)

    def error_once(self, reason: str, message: str, error: Exception) -> None:
        """Log an error with its traceback, once per reason."""
        if reason not in self._last_s:
            self._last_s[reason] = math.inf
            _LOGGER.error("%s: %s; monitor.counts has the number", reason, message, exc_info=error)


class Uploader:
    """Sends batches and truths to one gateway, one call at a time.

    Calls are retried with exponential backoff. The channel is opened by the first call.
    """

    def __init__(self, gateway: str, credentials: Credentials, log: ThrottledLog) -> None:
        self._gateway = gateway
        self._credentials = credentials
        self._log = log
        self._channel: grpc.Channel | None = None
        self._opening = threading.Lock()
        self._hurried = threading.Event()
        self._closed = threading.Event()

    def report(self, requests: list[pb.ReportRequest]) -> int:
        """Report a batch and return the number of stored observations.

        Raises Dropped for a refused batch, and after `close`.
        """
        return int(self._call(lambda stub: stub.Report.future, lambda: iter(requests)).stored)

    def attach_truth(self, request: pb.AttachTruthRequest) -> int:
        """Attach ground truth and return the number of known observations.

        Raises Dropped for a refused request, and after `close`.
        """
        return int(self._call(lambda stub: stub.AttachTruth.future, lambda: request).attached)

    def hurry(self) -> None:
        """Retry a waiting call at once."""
        self._hurried.set()

    def close(self) -> None:
        """Abort the current call and all further ones."""
        self._closed.set()
        with self._opening:
            if self._channel:
                self._channel.close()

    def _call(self, method: Callable[[Any], Any], request: Callable[[], Any]) -> Any:
        backoff_s = _FIRST_BACKOFF_S
        while not self._closed.is_set():
            try:
                call = method(self._stub())
                return call(request(), timeout=_DEADLINE_S, metadata=self._credentials.metadata()).result()
            except (grpc.FutureCancelledError, ValueError):  # `close` cancelled the call, or closed the channel
                if not self._closed.is_set():
                    raise
                continue
            except grpc.RpcError as error:
                self._raise_if_permanent(error)
            (self._closed if self._hurried.is_set() else self._hurried).wait(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        raise Dropped(CLOSED, "the monitor was closed before everything was delivered")

    def _raise_if_permanent(self, error: Any) -> None:
        """Raise Dropped for a permanent error; log a temporary one."""
        reason = error.code().name.lower()
        if error.code() in _PERMANENT_CODES:
            observation_id = from_rpc_error(error, address=self._gateway).metadata.get("id", "")
            message = f"the gateway at {self._gateway} refuses the report ({error.details()})"
            raise Dropped(reason, message, observation_id=observation_id)
        if not self._closed.is_set():
            self._log.warn(
                reason, f"the gateway at {self._gateway} accepts no reports ({error.details()}); retries continue"
            )

    def _stub(self) -> Any:
        with self._opening:
            if self._channel is None:
                self._channel = self._open_channel()
            return pb_grpc.MonitorServiceStub(self._channel)

    def _open_channel(self) -> grpc.Channel:
        """Return a new channel.

        Raises Dropped for unreadable TLS files.
        """
        try:
            channel: grpc.Channel = open_channel(grpc, self._gateway, TlsFiles.of_environment(), options=_OPTIONS)
        except InvalidInput as error:
            raise Dropped("bad_tls", error.message) from error
        return channel
