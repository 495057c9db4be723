"""`defuse monitor`: a model's traffic, and how it is watched."""

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from defuse.cli.output import JsonOption, print_json, print_table, record
from defuse.cli.releases import ModelArgument
from defuse.client import Client
from defuse.errors import InvalidInput
from defuse.values import Monitor, MonitorConfig

app = typer.Typer(help="What production traffic shows, and how it is watched.", no_args_is_help=True)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Keep(StrEnum):
    """What is kept of an image once it was looked at."""

    IMAGES = "images"
    LATENTS = "latents"


@app.command()
def show(name: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what is known of a model's traffic since its monitor began anew."""
    with Client() as client:
        monitor = client.monitor(name)
    if as_json:
        print_json(record(monitor))
        return
    print_table((f"traffic of {monitor.model}", ""), list(_facts(monitor).items()), caption="95 % intervals")
    if monitor.hits:
        rows = [
            (hits.region, hits.label, hits.hits, f"{hits.hits / max(1, monitor.observations):.4f}", hits.calm_rate)
            for hits in monitor.hits
        ]
        print_table(("region", "label", "images inside", "share", "share in calm"), rows, caption="as in the guard")


@app.command()
def configure(
    name: ModelArgument,
    run_length: Annotated[
        float | None, typer.Option(help="Observations between two false alarms, at least, in expectation.")
    ] = None,
    retention: Annotated[
        str | None, typer.Option(help="How long observations are kept, for instance 7d or 12h.")
    ] = None,
    keep: Annotated[Keep, typer.Option(help="What is kept of an image once it was looked at.")] = Keep.IMAGES,
    webhook: Annotated[str, typer.Option(help="URL that each alert is posted to as JSON.")] = "",
    start_runs: Annotated[
        bool, typer.Option("--start-runs", help="An alert about a region starts a run on the images that caused it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how a model's traffic is watched, all of it: what is not named takes its default."""
    with Client() as client:
        config = client.configure_monitor(
            name,
            expected_run_length=run_length,
            retention_s=None if retention is None else _seconds(retention),
            keep=keep.value,
            webhook_url=webhook,
            start_runs=start_runs,
        )
    if as_json:
        print_json(record(config))
    else:
        print_table((f"monitor of {name}", ""), list(_settings(config).items()), caption="")


def _facts(monitor: Monitor) -> dict[str, Any]:
    return {
        "observations": monitor.observations,
        "by version": ", ".join(f"{version}: {count}" for version, count in sorted(monitor.versions.items())),
        "guard": monitor.guard or "none: release a correction, or make one with `defuse guards create`",
        "prediction drift, 0 to 1": f"{monitor.prediction_drift:.3f}",
        "latent drift, -1 to 1": f"{monitor.latent_drift:.3f}",
        "accuracy, estimated": _share(monitor.estimated_accuracy),
        "accuracy, where truth came": f"{_share(monitor.real_accuracy)} of {monitor.truths}",
        **_settings(monitor.config),
    }


def _share(accuracy: float | None) -> str:
    return "not known" if accuracy is None else f"{accuracy:.3f}"


def _settings(config: MonitorConfig) -> dict[str, Any]:
    return {
        "run length": f"{config.expected_run_length:g}",
        "retention": f"{config.retention_s / _UNITS_S['d']:g} days",
        "keep": config.keep,
        "webhook": config.webhook_url or "none",
        "alerts start runs": "yes" if config.start_runs else "no",
    }


def _seconds(text: str) -> float:
    """Return the seconds in a length of time such as 7d."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts:
        raise InvalidInput(f"{text!r} is no length of time; use a number with s, m, h or d, for instance 7d")
    return float(parts[1]) * _UNITS_S[parts[2]]
