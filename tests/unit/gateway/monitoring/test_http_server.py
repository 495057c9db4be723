"""Senders that are slow, before the HTTP server itself."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.gateway.access.interceptors import RateLimits
from services.gateway.monitoring import http_server
from services.gateway.monitoring.cloud_events import CloudEvent
from services.gateway.monitoring.http_server import HttpServer
from services.gateway.settings import GatewaySettings
from services.localstack.child_process import free_port
from tests.events import attributes, binary


class Taking:
    """Takes events in groups of a size, and knows how many it took at the same time."""

    def __init__(self, *, together: int = 1) -> None:
        self.taken = self.at_once = self._now = 0
        self._together = asyncio.Barrier(together)

    async def take(self, model_name: str, event: CloudEvent) -> None:
        self._now += 1
        self.at_once = max(self.at_once, self._now)
        await self._together.wait()
        await asyncio.sleep(0.05)  # without the limit, others would enter now
        self._now -= 1
        self.taken += 1


def served(ask: Callable[[int], Awaitable[Any]], taking: Any) -> Any:
    """Serve HTTP; return what `ask` returns of the port."""

    async def run() -> Any:
        port = free_port()
        limits = RateLimits(calls_per_s=0, concurrent_calls=0)
        server = asyncio.create_task(HttpServer(GatewaySettings(http_port=port), taking, limits).run())
        try:
            return await asyncio.wait_for(ask(port), 30)
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)

    return asyncio.run(run())


async def posted(port: int, head: bytes, body: bytes) -> tuple[int, bytes]:
    """Send a request as it stands; return status and content of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/models/tiny:observe HTTP/1.1\r\nHost: here\r\n" + head + body)
    said = (await reader.readuntil(b"\r\n\r\n")).decode()
    content = await reader.readexactly(int(said.partition("Content-Length: ")[2].split()[0]))
    writer.close()
    return int(said.split()[1]), content


def whole() -> tuple[bytes, bytes]:
    """Return headers and body of an event."""
    headers, body = binary(attributes("a", "response"), {})
    lines = [f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": len(body)}.items()]
    return ("".join(lines) + "\r\n").encode(), body


def test_a_sender_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so, and its place is another's."""
    monkeypatch.setattr(http_server, "_READ_S", 2.0)
    monkeypatch.setattr(http_server, "_READ_AT_ONCE", 1)

    async def ask(port: int) -> Any:
        head, body = whole()
        slow = asyncio.create_task(posted(port, head, body[:1]))
        await asyncio.sleep(0.05)
        return await posted(port, head, body), await slow

    taken, (status, content) = served(ask, Taking())
    assert taken == (202, b"")
    assert status == 408
    assert json.loads(content)["error"] == {
        "message": "the event was not there within 2 s; send it faster, or smaller",
        "reason": "EVENT_TOO_SLOW",
    }


def test_events_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are accepted, few at once: the content of the others is in nobody's memory."""
    monkeypatch.setattr(http_server, "_READ_AT_ONCE", 2)
    taking = Taking(together=2)

    async def ask(port: int) -> Any:
        return await asyncio.gather(*(posted(port, *whole()) for _ in range(8)))

    assert served(ask, taking) == [(202, b"")] * 8
    assert (taking.taken, taking.at_once) == (8, 2)
