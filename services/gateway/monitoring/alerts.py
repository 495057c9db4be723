"""Alerts: stored, streamed to watchers and posted to webhooks."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC

import aiohttp
from defuse import names
from defuse.errors import NotFound
from defuse.v1 import monitor_pb2
from google.protobuf import json_format
from google.protobuf.message import Message

from services.gateway.monitoring.config import MonitoredModels
from services.gateway.records.paging import Cursor, Page
from services.runtime import telemetry
from services.runtime.queue import KEY, Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_MOST_WAITING = 1_000
# Posts under way at once, so that a slow server delays few others.
_AT_ONCE = 4
_ANSWER_S = 10.0
# Pauses in seconds before each further attempt; after the last one the alert is dropped.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)


class Webhooks:
    """Posts messages as JSON; counts and logs each dropped message."""

    def __init__(self, *, pauses_s: tuple[float, ...] = _PAUSES_S) -> None:
        self._pauses_s = pauses_s
        self._waiting: asyncio.Queue[tuple[str, Message]] = asyncio.Queue(_MOST_WAITING)

    def post(self, url: str, message: Message) -> None:
        """Enqueue a message, or drop it when too many are waiting."""
        try:
            self._waiting.put_nowait((url, message))
        except asyncio.QueueFull:
            _note("dropped", url)

    async def run(self) -> None:
        """Post queued messages until the task is cancelled."""
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
    """Post a message once, and return the reason of a failure.

    The reason is empty when the server accepted the message.
    """
    try:
        # Redirects are not followed: alerts go to the configured host only.
        async with session.post(url, json=json_format.MessageToDict(message), allow_redirects=False) as answer:
            return "" if 200 <= answer.status < 300 else f"HTTP status {answer.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _note(outcome: str, url: str, *, error: str = "too many are waiting") -> None:
    telemetry.WEBHOOKS.labels(outcome).inc()
    telemetry.log().error("alert_not_posted", url=url, outcome=outcome, error=error)


_RAISED = f"{KEY}alerts"
# Alerts that watchers can still read; they poll much more often than so many are raised.
_MOST_HEARD = 1_000
# How soon a watcher sees an alert. Polling works across gateways and reconnects.
_POLL_S = 0.2


class Alerts:
    """Raises, lists and watches alerts."""

    def __init__(self, queue: Queue, store: ArtifactStore, subjects: MonitoredModels, webhooks: Webhooks) -> None:
        self._redis = queue.redis
        self._store = store
        self._subjects = subjects
        self._webhooks = webhooks

    async def raise_(self, model_name: str, alert: monitor_pb2.Alert) -> monitor_pb2.Alert:
        """Store an alert of a model and notify watchers and webhooks.

        Returns the alert with its name and time. An alert that already has a name keeps it and is raised only once;
        such names must sort by time.
        """
        raised = monitor_pb2.Alert()
        raised.CopyFrom(alert)
        if not raised.HasField("create_time"):
            raised.create_time.GetCurrentTime()
        raised.name = raised.name or alert_name(model_name, raised, uuid.uuid4().hex[:6])
        key = keys.alert(raised.name)
        if await asyncio.to_thread(self._store.exists, key):
            return await self.get(raised.name)
        subject = await self._subjects.of(model_name)
        await self._redis.xadd(_RAISED, {"alert": raised.SerializeToString()}, maxlen=_MOST_HEARD)
        await self.keep(raised)
        kind = monitor_pb2.Alert.Kind.Name(raised.kind).removeprefix("KIND_").lower()
        telemetry.ALERTS.labels(model_name, kind).inc()
        telemetry.log().warning("alert", alert=raised.name, kind=kind, subject=raised.subject, summary=raised.summary)
        if subject.config.webhook_url:
            self._webhooks.post(subject.config.webhook_url, raised)
        return raised

    async def keep(self, alert: monitor_pb2.Alert) -> None:
        """Overwrite a stored alert."""
        await asyncio.to_thread(self._store.write_message, keys.alert(alert.name), alert)

    async def get(self, name: str) -> monitor_pb2.Alert:
        """Return an alert; raise NotFound for an unknown name."""
        names.check(name, "models/*/alerts/*", field="name")
        try:
            return await asyncio.to_thread(self._store.read_message, keys.alert(name), monitor_pb2.Alert)
        except NotFound as error:
            raise NotFound(f"there is no alert {names.last(name)!r}", reason="ALERT_NOT_FOUND") from error

    async def page(self, model_name: str, cursor: Cursor) -> Page[monitor_pb2.Alert]:
        """Return one page of the alerts of a model, newest first."""
        model = (await self._subjects.of(names.check(model_name, "models/*", field="model"))).model
        return await asyncio.to_thread(self._page, model.name, cursor)

    def _page(self, model_name: str, cursor: Cursor) -> Page[monitor_pb2.Alert]:
        before = str(cursor.after[0]) if cursor.after else None
        record_keys = reversed(self._store.keys(keys.alerts(model_name)))
        return cursor.page(
            ([key], self._store.read_message(keys.alert(key), monitor_pb2.Alert))
            for key in record_keys
            if before is None or key < before
        )

    async def begin_watch(self) -> str:
        """Return the present position in the stream of alerts."""
        last = await self._redis.xrevrange(_RAISED, count=1)
        return last[0][0].decode() if last else "0-0"

    async def watch(self, since: str, *, model_name: str = "") -> AsyncIterator[monitor_pb2.Alert]:
        """Yield alerts of one model or of all, as they are raised.

        The iterator does not end by itself.
        """
        while True:
            for entry, values in await self._redis.xrange(_RAISED, min=f"({since}"):
                since = entry.decode()
                alert = monitor_pb2.Alert.FromString(values[b"alert"])
                if model_name in {"", names.parent(alert.name)}:
                    yield alert
            await asyncio.sleep(_POLL_S)


def alert_name(model_name: str, alert: monitor_pb2.Alert, unique: str) -> str:
    """Return an alert's name, which sorts by time."""
    return f"{model_name}/alerts/{alert.create_time.ToDatetime(UTC):%Y%m%dT%H%M%S.%f}-{unique}"
