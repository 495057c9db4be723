"""MonitorService: translates and delegates."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from defuse import names
from defuse.v1 import monitor_service_pb2 as pb
from defuse.v1 import monitor_service_pb2_grpc as pb_grpc

from services.gateway.monitoring import config
from services.gateway.monitoring.alert_runs import AlertRuns
from services.gateway.monitoring.alerts import Alerts
from services.gateway.monitoring.deletion import Deletions
from services.gateway.monitoring.monitors import Monitors
from services.gateway.monitoring.receiving import received
from services.gateway.monitoring.reports import Reports
from services.gateway.monitoring.subjects import Subjects
from services.gateway.monitoring.truths import Truths
from services.gateway.paging import Cursor
from services.storage import keys
from services.storage.artifacts import ArtifactStore

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class MonitorRooms:
    """What the methods delegate to."""

    store: ArtifactStore
    subjects: Subjects
    reports: Reports
    monitors: Monitors
    truths: Truths
    deletions: Deletions
    alerts: Alerts
    alert_runs: AlertRuns


class MonitorService(pb_grpc.MonitorServiceServicer):
    """Production traffic."""

    def __init__(self, rooms: MonitorRooms) -> None:
        self._rooms = rooms

    async def Report(self, request_iterator: AsyncIterator[pb.ReportRequest], context: Context) -> pb.ReportResponse:
        subject, batch = await received(request_iterator, self._rooms.subjects.of)
        return pb.ReportResponse(stored=await self._rooms.reports.store(subject, batch))

    async def AttachTruth(self, request: pb.AttachTruthRequest, context: Context) -> pb.AttachTruthResponse:
        return pb.AttachTruthResponse(attached=await self._rooms.truths.attach(request.model, request.truths))

    async def DeleteObservations(
        self, request: pb.DeleteObservationsRequest, context: Context
    ) -> pb.DeleteObservationsResponse:
        return pb.DeleteObservationsResponse(deleted=await self._rooms.deletions.delete(request.model, request.ids))

    async def GetMonitor(self, request: pb.GetMonitorRequest, context: Context) -> pb.GetMonitorResponse:
        model_name = names.check(request.name.removesuffix("/monitor"), "models/*", field="name")
        return pb.GetMonitorResponse(monitor=await self._rooms.monitors.get(model_name))

    async def ConfigureMonitor(
        self, request: pb.ConfigureMonitorRequest, context: Context
    ) -> pb.ConfigureMonitorResponse:
        subject = await self._rooms.subjects.of(names.check(request.model, "models/*", field="model"))
        whole = config.complete(request.config)
        key = keys.monitor_config(subject.model.name)
        await asyncio.to_thread(self._rooms.store.write_message, key, whole)
        self._rooms.subjects.forget(subject.model.name)
        return pb.ConfigureMonitorResponse(config=whole)

    async def ListAlerts(self, request: pb.ListAlertsRequest, context: Context) -> pb.ListAlertsResponse:
        page = await self._rooms.alerts.page(request.model, Cursor.of(request, request.model))
        return pb.ListAlertsResponse(alerts=page.entries, next_page_token=page.next_page_token)

    async def WatchAlerts(
        self, request: pb.WatchAlertsRequest, context: Context
    ) -> AsyncIterator[pb.WatchAlertsResponse]:
        if request.model:
            await self._rooms.subjects.of(names.check(request.model, "models/*", field="model"))
        since = await self._rooms.alerts.begin_watch()
        # Whoever waits for the headers knows that it misses nothing from here on.
        await context.send_initial_metadata(())
        async for alert in self._rooms.alerts.watch(since, model_name=request.model):
            yield pb.WatchAlertsResponse(alert=alert)

    async def StartAlertRun(self, request: pb.StartAlertRunRequest, context: Context) -> pb.StartAlertRunResponse:
        return pb.StartAlertRunResponse(run=await self._rooms.alert_runs.start(request.name))
