"""Alerts: kept in the store, told to who watches at whichever gateway, posted to webhooks."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC

from defuse import names
from defuse.errors import NotFound
from defuse.v1 import monitor_pb2

from services.gateway.monitoring.subjects import Subjects
from services.gateway.monitoring.webhooks import Webhooks
from services.gateway.paging import Cursor, Page
from services.runtime import telemetry
from services.runtime.queue import KEY, Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_RAISED = f"{KEY}alerts"
# Of those that watchers can still hear of; they look much more often than so many are raised.
_MOST_HEARD = 1_000
# How soon a watcher hears of an alert. Polled: that holds across gateways and reconnects.
_POLL_S = 0.2


class Alerts:
    """Raises, lists and watches alerts."""

    def __init__(self, queue: Queue, store: ArtifactStore, subjects: Subjects, webhooks: Webhooks) -> None:
        self._redis = queue.redis
        self._store = store
        self._subjects = subjects
        self._webhooks = webhooks

    async def raise_(self, model_name: str, alert: monitor_pb2.Alert) -> monitor_pb2.Alert:
        """Keep an alert of a model and tell everybody; return it with its name and its time.

        One that has a name already, which sorts by time as those given here do, keeps it and is raised once.
        """
        raised = monitor_pb2.Alert()
        raised.CopyFrom(alert)
        if not raised.HasField("create_time"):
            raised.create_time.GetCurrentTime()
        raised.name = raised.name or name_of(model_name, raised, uuid.uuid4().hex[:6])
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
        """Write an alert as it is now."""
        await asyncio.to_thread(self._store.write_message, keys.alert(alert.name), alert)

    async def get(self, name: str) -> monitor_pb2.Alert:
        """Return an alert; raise NotFound for an unknown name."""
        names.check(name, "models/*/alerts/*", field="name")
        try:
            return await asyncio.to_thread(self._store.read_message, keys.alert(name), monitor_pb2.Alert)
        except NotFound as error:
            raise NotFound(f"there is no alert {names.last(name)!r}", reason="ALERT_NOT_FOUND") from error

    async def page(self, model_name: str, cursor: Cursor) -> Page[monitor_pb2.Alert]:
        """Return some of the alerts of a model, newest first."""
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
        """Return the moment from which on a watcher hears of alerts."""
        last = await self._redis.xrevrange(_RAISED, count=1)
        return last[0][0].decode() if last else "0-0"

    async def watch(self, since: str, *, model_name: str = "") -> AsyncIterator[monitor_pb2.Alert]:
        """Yield alerts as they are raised, of one model or of all, and do not end."""
        while True:
            for entry, values in await self._redis.xrange(_RAISED, min=f"({since}"):
                since = entry.decode()
                alert = monitor_pb2.Alert.FromString(values[b"alert"])
                if model_name in {"", names.parent(alert.name)}:
                    yield alert
            await asyncio.sleep(_POLL_S)


def name_of(model_name: str, alert: monitor_pb2.Alert, unique: str) -> str:
    """Return a name for an alert by its time, so that names are in the order in which alerts were raised."""
    return f"{model_name}/alerts/{alert.create_time.ToDatetime(UTC):%Y%m%dT%H%M%S.%f}-{unique}"
