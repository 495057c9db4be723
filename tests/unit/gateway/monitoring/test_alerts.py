"""Alerts: kept, listed, watched and posted."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from defuse.errors import NotFound
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb
from prometheus_client import REGISTRY

from services.gateway.monitoring.alerts import Alerts
from services.gateway.records.paging import Cursor
from services.storage.artifacts import ArtifactStore
from tests.monitored import MODEL, plant_model
from tests.unit.gateway.monitoring.raising import PAUSES_S, raised, with_alerts
from tests.webhook import webhook


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_alerts_are_listed_newest_first(redis_url: str, store: ArtifactStore) -> None:
    """A page at a time, none twice."""

    async def story(alerts: Alerts) -> None:
        told = [await alerts.raise_(MODEL, raised(f"r{number}")) for number in range(5)]
        assert await alerts.get(told[0].name) == told[0]
        request = pb.ListAlertsRequest(model=MODEL, page_size=2)
        listed: list[monitor_pb2.Alert] = []
        while not listed or request.page_token:
            page = await alerts.page(MODEL, Cursor.of(request, MODEL))
            listed += page.entries
            request.page_token = page.next_page_token
        assert listed == told[::-1]
        with pytest.raises(NotFound, match="there is no alert 'a'"):
            await alerts.get(f"{MODEL}/alerts/a")

    with_alerts(redis_url, store, story)


def test_an_alert_with_a_name_is_raised_once(redis_url: str, store: ArtifactStore) -> None:
    """So that who raises it may do so again after a crash."""

    async def story(alerts: Alerts) -> None:
        since = await alerts.begin_watch()
        first = await alerts.raise_(MODEL, raised("r1"))
        again = raised("r2")
        again.name = first.name
        assert await alerts.raise_(MODEL, again) == first
        heard = alerts.watch(since)
        assert await anext(heard) == first
        last = await alerts.raise_(MODEL, raised("r3"))
        assert await anext(heard) == last

    with_alerts(redis_url, store, story)


def test_an_alert_is_posted_until_it_is_taken(redis_url: str, store: ArtifactStore) -> None:
    """As the JSON of the contract, and nobody waits for it."""

    async def story(alerts: Alerts) -> None:
        alert = await alerts.raise_(MODEL, raised("r1"))
        await until(lambda: len(server.posted) == 3)
        [posted] = {str(one): one for one in server.posted}.values()
        assert (posted["name"], posted["kind"], posted["evidence"]) == (alert.name, "KIND_REGION_HITS", 1e6)

    with webhook([500, 302]) as server:
        with_alerts(redis_url, store, story, webhook=server.url)


def test_a_webhook_that_never_takes_it(redis_url: str, store: ArtifactStore) -> None:
    """The alert is given up and counted; the next one is posted."""

    def failed() -> float:
        return REGISTRY.get_sample_value("defuse_webhooks_total", {"outcome": "failed"}) or 0

    async def story(alerts: Alerts) -> None:
        before = failed()
        await alerts.raise_(MODEL, raised("r1"))
        await until(lambda: failed() == before + 1)
        await alerts.raise_(MODEL, raised("r2"))
        await until(lambda: server.posted[-1]["subject"] == "r2")

    with webhook([503] * (len(PAUSES_S) + 1)) as server:
        with_alerts(redis_url, store, story, webhook=server.url)


def test_alerts_of_one_model_and_of_all(redis_url: str, store: ArtifactStore) -> None:
    """A watcher of one model gets no alerts of others."""
    plant_model(store, "models/other")

    async def story(alerts: Alerts) -> None:
        since = await alerts.begin_watch()
        other = await alerts.raise_("models/other", raised("r1"))
        tiny = await alerts.raise_(MODEL, raised("r2"))
        assert await anext(alerts.watch(since, model_name=MODEL)) == tiny
        everything: Any = alerts.watch(since)
        assert [await anext(everything), await anext(everything)] == [other, tiny]

    with_alerts(redis_url, store, story)
