"""MonitorService and the construction of the parts that it delegates to."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from defuse import names
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc

from services.gateway.access.interceptors import RateLimits
from services.gateway.monitoring import config
from services.gateway.monitoring.alert_runs import AlertRuns
from services.gateway.monitoring.alerts import Alerts, Webhooks
from services.gateway.monitoring.batches import receive_batch
from services.gateway.monitoring.config import MonitoredModels
from services.gateway.monitoring.event_join import EventJoiner, PendingEvents
from services.gateway.monitoring.http_server import HttpServer
from services.gateway.monitoring.monitors import Monitors
from services.gateway.monitoring.observation_changes import Deletions, GroundTruth, Retention
from services.gateway.monitoring.observation_index import ObservationIndex
from services.gateway.monitoring.reports import BatchReports
from services.gateway.records.paging import Cursor
from services.gateway.runs.runs import Runs
from services.gateway.settings import GatewaySettings
from services.runtime.queue import Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class MonitorContext:
    """The objects that MonitorService delegates to."""

    store: ArtifactStore
    subjects: MonitoredModels
    reports: BatchReports
    monitors: Monitors
    truths: GroundTruth
    deletions: Deletions
    alerts: Alerts
    alert_runs: AlertRuns


class MonitorService(pb_grpc.MonitorServiceServicer):
    """The gRPC service for production traffic."""

    def __init__(self, context: MonitorContext) -> None:
        self._context = context

    async def Report(self, request_iterator: AsyncIterator[pb.ReportRequest], context: Context) -> pb.ReportResponse:
        subject, batch = await receive_batch(request_iterator, self._context.subjects.of)
        return pb.ReportResponse(stored=await self._context.reports.store(subject, batch))

    async def AttachTruth(self, request: pb.AttachTruthRequest, context: Context) -> pb.AttachTruthResponse:
        return pb.AttachTruthResponse(attached=await self._context.truths.attach(request.model, request.truths))

    async def DeleteObservations(
        self, request: pb.DeleteObservationsRequest, context: Context
    ) -> pb.DeleteObservationsResponse:
        return pb.DeleteObservationsResponse(deleted=await self._context.deletions.delete(request.model, request.ids))

    async def GetMonitor(self, request: pb.GetMonitorRequest, context: Context) -> pb.GetMonitorResponse:
        model_name = names.check(request.name.removesuffix("/monitor"), "models/*", field="name")
        return pb.GetMonitorResponse(monitor=await self._context.monitors.get(model_name))

    async def ConfigureMonitor(
        self, request: pb.ConfigureMonitorRequest, context: Context
    ) -> pb.ConfigureMonitorResponse:
        subject = await self._context.subjects.of(names.check(request.model, "models/*", field="model"))
        whole = config.complete(request.config)
        key = keys.monitor_config(subject.model.name)
        await asyncio.to_thread(self._context.store.write_message, key, whole)
        self._context.subjects.forget(subject.model.name)
        return pb.ConfigureMonitorResponse(config=whole)

    async def ListAlerts(self, request: pb.ListAlertsRequest, context: Context) -> pb.ListAlertsResponse:
        page = await self._context.alerts.page(request.model, Cursor.of(request, request.model))
        return pb.ListAlertsResponse(alerts=page.entries, next_page_token=page.next_page_token)

    async def WatchAlerts(
        self, request: pb.WatchAlertsRequest, context: Context
    ) -> AsyncIterator[pb.WatchAlertsResponse]:
        if request.model:
            await self._context.subjects.of(names.check(request.model, "models/*", field="model"))
        since = await self._context.alerts.begin_watch()
        # A caller that waits for the headers misses no later alert.
        await context.send_initial_metadata(())
        async for alert in self._context.alerts.watch(since, model_name=request.model):
            yield pb.WatchAlertsResponse(alert=alert)

    async def StartAlertRun(self, request: pb.StartAlertRunRequest, context: Context) -> pb.StartAlertRunResponse:
        return pb.StartAlertRunResponse(run=await self._context.alert_runs.start(request.name))


class Monitoring:
    """All parts of monitoring, connected with each other."""

    def __init__(
        self, settings: GatewaySettings, queue: Queue, store: ArtifactStore, runs: Runs, limits: RateLimits
    ) -> None:
        subjects = MonitoredModels(Catalog(store))
        index = ObservationIndex(queue, lambda batch: asyncio.to_thread(store.exists, keys.batch_record(batch)))
        webhooks = Webhooks()
        self.alerts = Alerts(queue, store, subjects, webhooks)
        self.alert_runs = AlertRuns(store, self.alerts, runs)
        self.monitors = Monitors(queue, store, subjects, self.alerts, self.alert_runs)
        deletions = Deletions(store, subjects, index, self.monitors.count_truth)
        self.reports = BatchReports(store, subjects, index, deletions)
        self.service = MonitorService(
            MonitorContext(
                store=store,
                subjects=subjects,
                reports=self.reports,
                monitors=self.monitors,
                truths=GroundTruth(store, subjects, index, self.monitors.count_truth),
                deletions=deletions,
                alerts=self.alerts,
                alert_runs=self.alert_runs,
            )
        )
        observing = EventJoiner(PendingEvents(queue), self.reports, subjects)
        self._loops = [self.monitors.run, self.reports.run, Retention(store).run, webhooks.run, *observing.loops]
        if settings.http_port:
            self._loops.append(HttpServer(settings, observing, limits).run)

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return the coroutines that run as long as the gateway."""
        return self._loops
