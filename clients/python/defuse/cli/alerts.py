"""`defuse alerts`: what has changed in production."""

import json
import sys
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, record
from defuse.cli.releases import ModelArgument
from defuse.client import Client
from defuse.report import to_json
from defuse.values import Alert

app = typer.Typer(help="What has changed in production.", no_args_is_help=True)


@app.command(name="list")
def list_(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the alerts of a model."""
    with Client() as client:
        found = client.alerts(name)
    if as_json:
        print_json([record(alert) for alert in found])
        return
    rows = [(alert.id, _when(alert), alert.kind.replace("_", " "), alert.summary, alert.run) for alert in found]
    print_table(("alert", "when", "what", "summary", "run"), rows, caption="newest first")


@app.command()
def watch(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of a model; by default all.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Print alerts as they are raised, one a line, until ctrl-C; --json prints all that is known of each."""
    with Client() as client:
        for alert in client.watch_alerts(name):
            line = json.dumps(to_json(record(alert))) if as_json else f"{_when(alert)} {alert.model}: {alert.summary}"
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


@app.command()
def run(
    name: ModelArgument,
    alert: Annotated[str, typer.Argument(metavar="ALERT", help="As `defuse alerts list` names it.")],
    as_json: JsonOption = False,
) -> None:
    """Start a run on the captured images that caused an alert about a region."""
    with Client() as client:
        started = client.start_alert_run(name, alert)
    if as_json:
        print_json(record(started))
    else:
        console.print(f"run {started.id}: {started.state}; follow it with `defuse runs watch {started.id}`")


def _when(alert: Alert) -> str:
    return alert.create_time.strftime("%Y-%m-%d %H:%M:%S UTC")
