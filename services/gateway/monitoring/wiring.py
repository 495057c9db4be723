"""The parts of monitoring, put together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from services.gateway.access.limits import Limits
from services.gateway.monitoring.alert_runs import AlertRuns
from services.gateway.monitoring.alerts import Alerts
from services.gateway.monitoring.deletion import Deletions
from services.gateway.monitoring.halves import Halves
from services.gateway.monitoring.http_server import HttpServer
from services.gateway.monitoring.index import Index
from services.gateway.monitoring.monitors import Monitors
from services.gateway.monitoring.observing import Observing
from services.gateway.monitoring.reports import Reports
from services.gateway.monitoring.retention import Retention
from services.gateway.monitoring.service import MonitorRooms, MonitorService
from services.gateway.monitoring.subjects import Subjects
from services.gateway.monitoring.truths import Truths
from services.gateway.monitoring.webhooks import Webhooks
from services.gateway.runs import Runs
from services.gateway.settings import GatewaySettings
from services.runtime.queue import Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog


class Monitoring:
    """What takes in the traffic of models, and what tells of it."""

    def __init__(
        self, settings: GatewaySettings, queue: Queue, store: ArtifactStore, runs: Runs, limits: Limits
    ) -> None:
        subjects = Subjects(Catalog(store))
        index = Index(queue, lambda batch: asyncio.to_thread(store.exists, keys.reported(batch)))
        webhooks = Webhooks()
        self.alerts = Alerts(queue, store, subjects, webhooks)
        self.alert_runs = AlertRuns(store, self.alerts, runs)
        self.monitors = Monitors(queue, store, subjects, self.alerts, self.alert_runs)
        deletions = Deletions(store, subjects, index, self.monitors.count_truth)
        self.reports = Reports(store, subjects, index, deletions)
        self.service = MonitorService(
            MonitorRooms(
                store=store,
                subjects=subjects,
                reports=self.reports,
                monitors=self.monitors,
                truths=Truths(store, subjects, index, self.monitors.count_truth),
                deletions=deletions,
                alerts=self.alerts,
                alert_runs=self.alert_runs,
            )
        )
        observing = Observing(Halves(queue), self.reports, subjects)
        self._loops = [self.monitors.run, self.reports.run, Retention(store).run, webhooks.run, *observing.loops]
        if settings.http_port:
            self._loops.append(HttpServer(settings, observing, limits).run)

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """What runs as long as the gateway."""
        return self._loops
