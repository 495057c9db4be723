"""The gateway's HTTP server: `POST /v1/models/{model}:observe` takes CloudEvents.

An event is answered with 202 once it is in Redis, where it waits for its counterpart. Senders such as KServe's payload
logger drop events that are not accepted quickly.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp.web
from defuse import names
from defuse.errors import (
    Conflict,
    DeadlineExceeded,
    DefuseError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    StoreFull,
    Unauthenticated,
    Unavailable,
)
from defuse.tls import TlsFiles
from defuse.v1 import access_pb2

from services.gateway.access import roles
from services.gateway.access.interceptors import RateLimits, authenticate
from services.gateway.monitoring.cloud_events import parse_event
from services.gateway.monitoring.event_join import EventJoiner
from services.gateway.settings import GatewaySettings
from services.gateway.tokens import Tokens
from services.runtime import telemetry
from services.runtime.interceptors import to_known_error

# Seconds that a sender may take for its event, and events that are read and parsed at once: each may be as large as a
# message, and several times that once parsed.
_READ_S = 30.0
_READ_AT_ONCE = 8
_STATUSES: Mapping[type[DefuseError], int] = {
    InvalidInput: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    NotFound: 404,
    DeadlineExceeded: 408,
    Conflict: 409,
    LimitExceeded: 429,
    Unavailable: 503,
    StoreFull: 507,
}


class HttpServer:
    """Serves HTTP on one port."""

    def __init__(self, settings: GatewaySettings, observing: EventJoiner, limits: RateLimits) -> None:
        self._observing = observing
        self._tokens = Tokens(settings.tokens_file) if settings.tokens_file else None
        self._limits = limits
        self._most_bytes = settings.max_message_bytes
        self._reading = asyncio.Semaphore(_READ_AT_ONCE)
        self._tls = _context(settings.tls)
        self._socket = _listening(settings.host, settings.http_port)

    async def run(self) -> None:
        """Serve until the task is cancelled."""
        application = aiohttp.web.Application(client_max_size=self._most_bytes)
        application.router.add_post("/v1/models/{model}:observe", self._observe)
        runner = aiohttp.web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            await aiohttp.web.SockSite(runner, self._socket, ssl_context=self._tls).start()
            telemetry.log().info("listening_http", address="{}:{}".format(*self._socket.getsockname()[:2]))
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _observe(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        try:
            with self._limits.admitted(self._who(request)):
                self._admit(request)
                model_name = names.model(request.match_info["model"])
                async with self._reading:
                    event = await asyncio.to_thread(parse_event, request.headers, await _body(request))
                    await self._observing.take(model_name, event)
        except aiohttp.web.HTTPException:
            raise
        except Exception as error:  # noqa: BLE001  # everything becomes a status
            return _refusal(error)
        return aiohttp.web.Response(status=202)

    def _who(self, request: aiohttp.web.Request) -> str:
        """Return the name under which a call counts, admitted or not.

        It is the name of the caller's token, or its host without a valid token.
        """
        if self._tokens:
            with suppress(Unauthenticated):
                return authenticate(self._tokens, request.headers.get("authorization", "")).name
        return request.remote or ""

    def _admit(self, request: aiohttp.web.Request) -> None:
        """Raise Unauthenticated or PermissionDenied unless the caller may report."""
        if self._tokens:
            roles.set_caller(authenticate(self._tokens, request.headers.get("authorization", "")))
            roles.require(access_pb2.ROLE_OPERATOR, "observe")


async def _body(request: aiohttp.web.Request) -> bytes:
    """Return the body of a request; raise DeadlineExceeded for a slow sender."""
    try:
        async with asyncio.timeout(_READ_S):
            return await request.read()
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the event was not there within {_READ_S:g} s; send it faster, or smaller", reason="EVENT_TOO_SLOW"
        ) from error


def _refusal(error: Exception) -> aiohttp.web.Response:
    known = to_known_error(error)
    status = next((_STATUSES[cls] for cls in type(known).__mro__ if cls in _STATUSES), 500)
    if status == 500:
        telemetry.log().error("event_failed", exc_info=error)
    wait: dict[str, Any] = (
        {} if known.retry_after_s is None else {"Retry-After": str(max(1, round(known.retry_after_s)))}
    )
    content = {"error": {"message": known.message, "reason": known.reason}}
    return aiohttp.web.json_response(content, status=status, headers=wait)


def _context(tls: TlsFiles) -> ssl.SSLContext | None:
    if not tls.certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.authority)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.authority:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: is DEFUSE_HTTP_PORT taken? ({error})") from error
