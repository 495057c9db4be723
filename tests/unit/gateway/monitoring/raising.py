"""Alerts of one model, over a real Redis and a real store."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from defuse.v1 import monitor_pb2

from services.gateway.monitoring.alerts import Alerts, Webhooks
from services.gateway.monitoring.config import MonitoredModels
from services.runtime.queue import Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.monitored import MODEL, plant_model
from tests.queues import close_queues

HITS = monitor_pb2.Alert.KIND_REGION_HITS
# Of a webhook that does not answer.
PAUSES_S = (0.01, 0.01)


def raised(subject: str) -> monitor_pb2.Alert:
    return monitor_pb2.Alert(kind=HITS, subject=subject, summary=f"more images in {subject}", evidence=1e6)


def with_alerts(url: str, store: ArtifactStore, story: Callable[[Alerts], Awaitable[Any]], *, webhook: str = "") -> Any:
    """Tell a story to the alerts of a gateway; return its end."""
    plant_model(store)
    config = monitor_pb2.MonitorConfig(webhook_url=webhook)
    store.write_message(keys.monitor_config(MODEL), config)

    async def tell() -> Any:
        queue, webhooks = Queue(url), Webhooks(pauses_s=PAUSES_S)
        posting = asyncio.create_task(webhooks.run())
        try:
            return await asyncio.wait_for(story(Alerts(queue, store, MonitoredModels(Catalog(store)), webhooks)), 60)
        finally:
            posting.cancel()
            await close_queues(queue)

    return asyncio.run(tell())
