"""Production traffic: how it is watched, what is known of it, what has changed."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice

from google.protobuf.duration_pb2 import Duration

from defuse import names
from defuse.calls.pages import listed
from defuse.errors import InvalidInput
from defuse.steps import Call, Steps, Stream
from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb
from defuse.values import Alert, Monitor, MonitorConfig, Run

_MOST_IDS = 10_000


def monitor(model_id: str) -> Steps[Monitor]:
    """Return what is known of a model's traffic."""
    answer = yield Call(method="GetMonitor", request=pb.GetMonitorRequest(name=names.monitor(model_id)))
    return Monitor.from_proto(answer.monitor)


def configure_monitor(
    model_id: str,
    *,
    expected_run_length: float | None = None,
    retention_s: float | None = None,
    keep: str = "images",
    webhook_url: str = "",
    start_runs: bool = False,
) -> Steps[MonitorConfig]:
    """Say how a model's traffic is watched, all of it: what is left out takes its default. For admins.

    `keep`: `images`, or `latents` alone once an image was looked at. Raises InvalidInput for values out of bounds.
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
    answer = yield Call(method="ConfigureMonitor", request=request)
    return MonitorConfig.from_proto(answer.config)


def alerts(model_id: str) -> Steps[list[Alert]]:
    """Return the alerts of a model, newest first."""
    found = yield from listed("ListAlerts", pb.ListAlertsRequest(model=names.model(model_id)), "alerts")
    return [Alert.from_proto(message) for message in found]


def watch_alerts(model_id: str = "") -> Stream[Alert]:
    """Yield the alerts of a model, or of all, as they are raised, for ever; lost connections are made again.

    What was raised while there was no connection is in `alerts`.
    """
    request = pb.WatchAlertsRequest(model=names.model(model_id) if model_id else "")
    return Stream(method="WatchAlerts", request=request, read=lambda answer: Alert.from_proto(answer.alert))


def start_alert_run(model_id: str, alert_id: str) -> Steps[Run]:
    """Start a run on the captured images that caused an alert about a region; return the one that it has already.

    Raises NotReady where no images were kept.
    """
    request = pb.StartAlertRunRequest(name=names.alert(model_id, alert_id))
    answer = yield Call(method="StartAlertRun", request=request)
    return Run.from_proto(answer.run)


def attach_truth(model_id: str, truths: Mapping[str, str]) -> Steps[int]:
    """Say what observations really show, class names by their ids; return how many of the ids are known."""
    attached = 0
    rest = iter(truths.items())
    while some := dict(islice(rest, _MOST_IDS)):
        request = pb.AttachTruthRequest(model=names.model(model_id), truths=some)
        attached += (yield Call(method="AttachTruth", request=request)).attached
    return attached


def delete_observations(model_id: str, ids: Sequence[str]) -> Steps[int]:
    """Delete observations with all that is kept of their images; return how many of the ids were known."""
    deleted = 0
    for begin in range(0, len(ids), _MOST_IDS):
        request = pb.DeleteObservationsRequest(model=names.model(model_id), ids=ids[begin : begin + _MOST_IDS])
        deleted += (yield Call(method="DeleteObservations", request=request)).deleted
    return deleted


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
