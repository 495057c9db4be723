"""`defuse monitor`, `alerts` and `audit`: production traffic and audit log."""

import json
import re
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from defuse.cli.output import TIME_FORMAT, JsonOption, ModelArgument, console, print_json, print_table, to_record
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.values import Alert, MonitorConfig, MonitorState

monitor_app = typer.Typer(help="Monitors of production traffic.", no_args_is_help=True)
alerts_app = typer.Typer(help="Alerts about changes in production traffic.", no_args_is_help=True)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Keep(StrEnum):
    """Content stored after the evaluation of an image."""

    IMAGES = "images"
    LATENTS = "latents"


@monitor_app.command()
def show(name: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a model's traffic, region hits, drift and accuracy."""
    with Client() as client:
        monitor = client.monitor(name)
    if as_json:
        print_json(to_record(monitor))
        return
    print_table((f"traffic of {monitor.model}", ""), list(_facts(monitor).items()), caption="95 % intervals")
    if monitor.hits:
        rows = [
            (hits.region, hits.label, hits.hits, f"{hits.hits / max(1, monitor.observations):.4f}", hits.reference_rate)
            for hits in monitor.hits
        ]
        columns = ("region", "label", "images inside", "share", "share of reference images")
        print_table(columns, rows, caption="in the order of the guard")


def _facts(monitor: MonitorState) -> dict[str, Any]:
    return {
        "observations": monitor.observations,
        "by version": ", ".join(f"{version}: {count}" for version, count in sorted(monitor.versions.items())),
        "guard": monitor.guard or "none: release a correction, or make one with `defuse guards create`",
        "prediction drift, 0 to 1": f"{monitor.prediction_drift:.3f}",
        "latent drift, -1 to 1": f"{monitor.latent_drift:.3f}",
        "estimated accuracy": _accuracy(monitor.estimated_accuracy),
        "accuracy with ground truth": f"{_accuracy(monitor.real_accuracy)} of {monitor.truths}",
        **_settings(monitor.config),
    }


def _accuracy(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _settings(config: MonitorConfig) -> dict[str, Any]:
    return {
        "run length": f"{config.expected_run_length:g}",
        "retention": f"{config.retention_s / _UNITS_S['d']:g} days",
        "keep": config.keep,
        "webhook": config.webhook_url or "none",
        "alerts start runs": "yes" if config.start_runs else "no",
    }


@monitor_app.command()
def configure(
    name: ModelArgument,
    run_length: Annotated[
        float | None, typer.Option(help="Observations between two false alarms, in expectation, at least.")
    ] = None,
    retention: Annotated[
        str | None, typer.Option(help="How long observations are stored, for instance 7d or 12h.")
    ] = None,
    keep: Annotated[Keep, typer.Option(help="Content stored after the evaluation of an image.")] = Keep.IMAGES,
    webhook: Annotated[str, typer.Option(help="URL that receives each alert as JSON.")] = "",
    start_runs: Annotated[
        bool, typer.Option("--start-runs", help="Start a run on the images that caused an alert about a region.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace a monitor's configuration; omitted options take their defaults."""
    with Client() as client:
        config = client.configure_monitor(
            name,
            expected_run_length=run_length,
            retention_s=None if retention is None else _parse_duration_s(retention),
            keep=keep.value,
            webhook_url=webhook,
            start_runs=start_runs,
        )
    if as_json:
        print_json(to_record(config))
    else:
        print_table((f"monitor of {name}", ""), list(_settings(config).items()), caption="")


def _parse_duration_s(text: str) -> float:
    """Return the seconds of a duration such as 7d."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts:
        raise InvalidInput(f"{text!r} is not a duration; use a number with s, m, h or d, for instance 7d")
    return float(parts[1]) * _UNITS_S[parts[2]]


@alerts_app.command(name="list")
def list_alerts(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the alerts of a model."""
    with Client() as client:
        alerts = client.alerts(name)
    if as_json:
        print_json([to_record(alert) for alert in alerts])
        return
    rows = [(alert.id, _time(alert), alert.kind.replace("_", " "), alert.summary, alert.run) for alert in alerts]
    print_table(("alert", "time", "kind", "summary", "run"), rows, caption="newest first")


@alerts_app.command(name="watch")
def watch_alerts(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Id of a model; by default all models.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Print new alerts, one per line, until ctrl-C.

    --json prints every field of an alert.
    """
    with Client() as client:
        for alert in client.watch_alerts(name):
            line = json.dumps(to_record(alert)) if as_json else f"{_time(alert)} {alert.model}: {alert.summary}"
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


@alerts_app.command(name="run")
def run_alert(
    name: ModelArgument,
    alert: Annotated[str, typer.Argument(metavar="ALERT", help="Id of the alert, from `defuse alerts list`.")],
    as_json: JsonOption = False,
) -> None:
    """Start a run on the captured images that caused a region alert."""
    with Client() as client:
        run = client.start_alert_run(name, alert)
    if as_json:
        print_json(to_record(run))
    else:
        console.print(f"run {run.id}: {run.state}; follow it with `defuse runs watch {run.id}`")


def _time(alert: Alert) -> str:
    return alert.create_time.strftime(TIME_FORMAT)


def audit(
    limit: Annotated[int, typer.Option(min=1, help="Number of events.")] = 50, as_json: JsonOption = False
) -> None:
    """List the latest audit events.

    The caller must be an admin. An event is a call that changed something or tried to.
    """
    with Client() as client:
        events = client.audit_events(limit)
    if as_json:
        print_json([to_record(event) for event in events])
        return
    rows = [
        (
            event.time.strftime(TIME_FORMAT),
            event.caller,
            event.role,
            event.method.rpartition("/")[2],
            ", ".join(event.resources),
            event.reason or event.code,
            event.peer,
        )
        for event in events
    ]
    columns = ("time", "caller", "role", "call", "resources", "outcome", "peer")
    print_table(columns, rows, caption="newest first")
