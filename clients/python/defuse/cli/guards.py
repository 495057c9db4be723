"""`defuse guards`: which known region a live image falls in."""

from typing import Annotated

import typer

from defuse.cli.output import JsonOption, print_json, print_table, record
from defuse.cli.releases import ModelArgument
from defuse.cli.runs import RunArgument
from defuse.client import Client
from defuse.values import Guard

app = typer.Typer(help="Which known region a live image falls in, answered beside its class.", no_args_is_help=True)


@app.command()
def create(
    run: RunArgument,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Share of images without a failure that may be said to be inside a region.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Make a guard of the labelled regions of a run and serve it; each release makes one by itself."""
    with Client() as client:
        guard = client.create_guard(run, false_alarm_rate=false_alarm_rate)
    if as_json:
        print_json(record(guard))
    else:
        _print([guard])


@app.command(name="list")
def list_(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the guards of a model with what they find; the last one is served."""
    with Client() as client:
        guards = client.guards(name)
    if as_json:
        print_json([record(guard) for guard in guards])
    else:
        _print(guards)


def _print(guards: list[Guard]) -> None:
    rows = [
        (
            guard.id,
            guard.run,
            ", ".join(f"{region} ({label})" for region, label in guard.regions.items()),
            f"{guard.false_alarm_rate:g}",
            guard.measured_false_alarm_rate,
            guard.recall,
            guard.guarded_model,
        )
        for guard in guards
    ]
    columns = ("guard", "run", "regions (label)", "false alarms stated", "measured", "recall", "in Triton")
    print_table(columns, rows, caption="oldest first; recall of held-out failures; 95 % intervals")
