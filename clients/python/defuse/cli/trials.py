"""`defuse trials`: candidates on live requests."""

from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, record
from defuse.cli.releases import ActorOption, ModelArgument, ReasonOption, latest_correction
from defuse.cli.runs import RunArgument
from defuse.client import Client
from defuse.values import Trial

app = typer.Typer(help="Candidates on live requests, before they are released.", no_args_is_help=True)
TrialArgument = Annotated[str, typer.Argument(metavar="TRIAL", help="For instance t1.")]


@app.command()
def start(
    run: RunArgument,
    correction: Annotated[
        str | None, typer.Option(help="Correction whose candidate is tried; by default the latest.")
    ] = None,
    share: Annotated[float, typer.Option(help="Part of the requests through the gateway, in (0, 1].")] = 0.1,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only compare answers; without it the candidate answers callers.")
    ] = False,
    reason: ReasonOption = "",
    actor: ActorOption = None,
    approver: Annotated[
        str, typer.Option(help="Who lets it answer callers although it does not pass the gate; needs a reason.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Try a correction's candidate on a share of the live requests: it answers them, or is compared in their shadow."""
    with Client() as client:
        trial = client.start_trial(
            run,
            correction or latest_correction(client, run),
            mode="shadow" if shadow else "canary",
            share=share,
            reason=reason,
            actor=actor,
            approver=approver,
        )
    _print(trial, as_json=as_json)


@app.command(name="list")
def list_(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the trials of a model."""
    with Client() as client:
        found = client.trials(name)
    if as_json:
        print_json([record(trial) for trial in found])
        return
    rows = [
        (trial.id, trial.state, trial.mode, f"{trial.share:g}", trial.correction, trial.actor, trial.reason)
        for trial in found
    ]
    print_table(("trial", "state", "mode", "share", "of", "by", "why"), rows, caption="oldest first")


@app.command()
def show(name: ModelArgument, trial: TrialArgument, as_json: JsonOption = False) -> None:
    """Show what a trial has seen."""
    with Client() as client:
        _print(client.trial(name, trial), as_json=as_json)


@app.command()
def stop(name: ModelArgument, trial: TrialArgument, as_json: JsonOption = False) -> None:
    """End a trial."""
    with Client() as client:
        _print(client.stop_trial(name, trial), as_json=as_json)


def _print(trial: Trial, *, as_json: bool) -> None:
    if as_json:
        print_json(record(trial))
        return
    counts = trial.counts
    rows = [
        ("champion", counts.champion_requests, f"{counts.champion_ms:.2f}", ""),
        ("challenger", counts.challenger_requests, f"{counts.challenger_ms:.2f}", counts.challenger_errors),
    ]
    caption = f"{trial.mode} {trial.id} of {trial.model}, {trial.state}: {trial.correction}, share {trial.share:g}"
    print_table(("", "requests", "mean ms", "not answered"), rows, caption=caption)
    if trial.mode == "shadow":
        console.print(
            f"{counts.agreed} of {counts.compared} images were given the same class; {counts.dropped} requests were "
            "drawn but not compared"
        )
