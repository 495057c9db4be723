"""TLS of servers, channels to other servers, and calls to other services.

Certificate files may be renewed while a server runs.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from defuse.errors import DefuseError, InvalidInput, from_rpc_error
from defuse.tls import TlsFiles, open_channel

from services.runtime import telemetry, tracing
from services.runtime.settings import MAX_MESSAGE_BYTES


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return the credentials of a server.

    With an authority, callers must present a certificate that it signed. Files are read again when they change, and
    invalid content leaves the previous one in use. Raises InvalidInput when a file cannot be read or is invalid at
    start.
    """
    return grpc.dynamic_ssl_server_credentials(
        _read(files),
        _renewed(files),  # type: ignore[arg-type]  # None is "as before"
        require_client_authentication=files.authority is not None,
    )


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    _check(files)
    pair = (files.read("key") or b"", files.read("certificate") or b"")
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=files.read("authority"))


def _renewed(files: TlsFiles) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Return a callback for each TLS handshake.

    The callback returns the new configuration, or None without a change.
    """
    seen = _stamps(files)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        now = _stamps(files)
        if now == seen:
            return None
        seen = now  # also set for invalid files, which are logged once
        try:
            configuration = _read(files)
        except DefuseError as error:
            telemetry.log().warning("certificate_not_renewed", error=error.message)
            return None
        telemetry.log().info("certificate_renewed", certificate=str(files.certificate))
        return configuration

    return fetch


def _check(files: TlsFiles) -> None:
    """Raise InvalidInput for mismatched or invalid certificate files.

    gRPC would not name the reason.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(str(files.certificate), str(files.key))
        if files.authority:
            context.load_verify_locations(str(files.authority))
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"{files.certificate}, {files.key} and {files.authority} are no certificate, its key and an authority "
            f"({error}); they are read as PEM"
        ) from error


def _stamps(files: TlsFiles) -> list[int]:
    """Return the modification time of each file, 0 for a missing one."""
    named = [path for path in (files.certificate, files.key, files.authority) if path]
    return [_changed(path) for path in named]


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


UNLIMITED = -1


def channel_to(address: str, tls: TlsFiles, *, receive_bytes: int) -> Any:
    """Return an asyncio channel to HOST:PORT or grpcs://HOST:PORT.

    It accepts answers of at most `receive_bytes` bytes.
    """
    options = [("grpc.max_receive_message_length", receive_bytes), ("grpc.max_send_message_length", UNLIMITED)]
    return open_channel(grpc.aio, address, tls, options=options, interceptors=tracing.client_interceptors())


S = TypeVar("S")
# Loading a model takes seconds; no direct answer of a service takes longer than this.
DEADLINE_S = 120.0


class ServiceClient(Generic[S]):
    """Calls another service with deadlines."""

    def __init__(self, url: str, stub: Callable[[grpc.aio.Channel], S], tls: TlsFiles) -> None:
        self.url = url
        self._channel = channel_to(url, tls, receive_bytes=MAX_MESSAGE_BYTES)
        self._stub = stub(self._channel)

    async def call(self, method: Callable[..., Any], *, deadline_s: float | None = DEADLINE_S) -> Any:
        """Make a call with a deadline, by default `DEADLINE_S`.

        Raises the error of the other service.
        """
        try:
            return await method(self._stub, timeout=deadline_s or DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=self.url) from error

    async def close(self) -> None:
        await self._channel.close()
