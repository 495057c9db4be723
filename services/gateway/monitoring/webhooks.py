"""Alerts posted to URLs, in the background: whoever raises one waits for nobody."""

import asyncio

import aiohttp
from google.protobuf import json_format
from google.protobuf.message import Message

from services.runtime import telemetry

_MOST_WAITING = 1_000
# Posts under way at the same time: a server that is slow holds up few others.
_AT_ONCE = 4
_ANSWER_S = 10.0
# Seconds before the next attempt; after the last of them an alert is given up.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)


class Webhooks:
    """Posts messages as JSON; each one that is given up is counted and logged."""

    def __init__(self, *, pauses_s: tuple[float, ...] = _PAUSES_S) -> None:
        self._pauses_s = pauses_s
        self._waiting: asyncio.Queue[tuple[str, Message]] = asyncio.Queue(_MOST_WAITING)

    def post(self, url: str, message: Message) -> None:
        """Have a message posted; where too many wait already it is dropped."""
        try:
            self._waiting.put_nowait((url, message))
        except asyncio.QueueFull:
            _note("dropped", url)

    async def run(self) -> None:
        """Post what is there until the task is cancelled."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._post_all(session) for _ in range(_AT_ONCE)))

    async def _post_all(self, session: aiohttp.ClientSession) -> None:
        while True:
            url, message = await self._waiting.get()
            await self._deliver(session, url, message)

    async def _deliver(self, session: aiohttp.ClientSession, url: str, message: Message) -> None:
        fault = ""
        for pause_s in (*self._pauses_s, None):
            fault = await _attempt(session, url, message)
            if not fault:
                telemetry.WEBHOOKS.labels("delivered").inc()
                return
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        _note("failed", url, error=fault)


async def _attempt(session: aiohttp.ClientSession, url: str, message: Message) -> str:
    """Return what went wrong; nothing where the server took it."""
    try:
        # Where a server sends one elsewhere, nobody said that alerts may go there.
        async with session.post(url, json=json_format.MessageToDict(message), allow_redirects=False) as answer:
            return "" if 200 <= answer.status < 300 else f"HTTP status {answer.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _note(outcome: str, url: str, *, error: str = "too many are waiting") -> None:
    telemetry.WEBHOOKS.labels(outcome).inc()
    telemetry.log().error("alert_not_posted", url=url, outcome=outcome, error=error)
