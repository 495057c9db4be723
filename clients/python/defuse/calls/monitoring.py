"""Calls for monitors, alerts, ground truth and the audit log."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice

from google.protobuf.duration_pb2 import Duration

from defuse import names
from defuse.calls.sans_io import Rpc, SansIoCall, StreamRpc, list_all_pages
from defuse.errors import InvalidInput
from defuse.v1 import audit_pb2, gateway_service_pb2, monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb
from defuse.values import Alert, AuditEvent, MonitorConfig, MonitorState, Run

_MAX_IDS_PER_CALL = 10_000


def monitor(model_id: str) -> SansIoCall[MonitorState]:
    """Return a model's monitor: traffic, region hits, drift and accuracy."""
    response = yield Rpc(method="GetMonitor", request=pb.GetMonitorRequest(name=names.monitor(model_id)))
    return MonitorState.from_proto(response.monitor)


def configure_monitor(
    model_id: str,
    *,
    expected_run_length: float | None = None,
    retention_s: float | None = None,
    keep: str = "images",
    webhook_url: str = "",
    start_runs: bool = False,
) -> SansIoCall[MonitorConfig]:
    """Replace the configuration of a model's monitor.

    The caller must be an admin. Omitted settings take their defaults. Raises InvalidInput for values out of bounds.

    Args:
        model_id: Id of the model.
        expected_run_length: Observations between two false alarms, in expectation, at
            least.
        retention_s: How long observations are stored, in seconds.
        keep: `images`, or `latents` to delete images after their evaluation.
        webhook_url: URL to which alerts are posted.
        start_runs: Whether an alert about a region starts a run on the images that
            caused it.
    """
    if keep not in {"images", "latents"}:
        raise InvalidInput(f"keep {keep!r} is unknown; use images or latents")
    config = monitor_pb2.MonitorConfig(
        expected_run_length=expected_run_length or 0.0,
        retention=None if retention_s is None else _duration(retention_s),
        keep=monitor_pb2.MonitorConfig.Keep.Value(f"KEEP_{keep.upper()}"),
        webhook_url=webhook_url,
        start_runs=start_runs,
    )
    request = pb.ConfigureMonitorRequest(model=names.model(model_id), config=config)
    response = yield Rpc(method="ConfigureMonitor", request=request)
    return MonitorConfig.from_proto(response.config)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


def alerts(model_id: str) -> SansIoCall[list[Alert]]:
    """Return the alerts of a model, newest first."""
    messages = yield from list_all_pages("ListAlerts", pb.ListAlertsRequest(model=names.model(model_id)), "alerts")
    return [Alert.from_proto(message) for message in messages]


def watch_alerts(model_id: str = "") -> StreamRpc[Alert]:
    """Yield new alerts of a model, or of all models, without end.

    The stream reconnects after connection losses. Alerts that were raised during a connection loss are missing;
    `alerts` lists them.
    """
    request = pb.WatchAlertsRequest(model=names.model(model_id) if model_id else "")
    return StreamRpc(method="WatchAlerts", request=request, parse=lambda response: Alert.from_proto(response.alert))


def start_alert_run(model_id: str, alert_id: str) -> SansIoCall[Run]:
    """Start a run on the captured images that caused a region alert.

    Returns the existing run of an alert that has one. Raises NotReady if no images were kept.
    """
    request = pb.StartAlertRunRequest(name=names.alert(model_id, alert_id))
    response = yield Rpc(method="StartAlertRun", request=request)
    return Run.from_proto(response.run)


def attach_truth(model_id: str, truths: Mapping[str, str]) -> SansIoCall[int]:
    """Attach ground truth to observations, and return the number of known ids.

    `truths` maps observation ids to class names.
    """
    attached = 0
    remaining = iter(truths.items())
    while batch := dict(islice(remaining, _MAX_IDS_PER_CALL)):
        request = pb.AttachTruthRequest(model=names.model(model_id), truths=batch)
        attached += (yield Rpc(method="AttachTruth", request=request)).attached
    return attached


def delete_observations(model_id: str, ids: Sequence[str]) -> SansIoCall[int]:
    """Delete observations, and return the number of known ids.

    Everything derived from their images is deleted as well.
    """
    deleted = 0
    for begin in range(0, len(ids), _MAX_IDS_PER_CALL):
        batch = ids[begin : begin + _MAX_IDS_PER_CALL]
        request = pb.DeleteObservationsRequest(model=names.model(model_id), ids=batch)
        deleted += (yield Rpc(method="DeleteObservations", request=request)).deleted
    return deleted


def audit_events(limit: int = 50) -> SansIoCall[list[AuditEvent]]:
    """Return the latest `limit` audit events, newest first.

    The caller must be an admin. An event is a call that changed something or tried to.
    """
    events: list[audit_pb2.AuditEvent] = []
    request = gateway_service_pb2.ListAuditEventsRequest()
    while True:
        request.page_size = limit - len(events)
        response = yield Rpc(method="ListAuditEvents", request=request)
        events += response.events
        if len(events) >= limit or not response.next_page_token:
            return [AuditEvent.from_proto(event) for event in events]
        request.page_token = response.next_page_token
