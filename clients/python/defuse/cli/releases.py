"""`defuse gate`, `release`, `rollback`, `releases` and `trials`: model versions."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import (
    EXIT_FAILED,
    TIME_FORMAT,
    JsonOption,
    ModelArgument,
    RunArgument,
    console,
    print_json,
    print_table,
    to_record,
)
from defuse.client import Client
from defuse.errors import NotReady
from defuse.values import GateVerdict, Release, Trial

trials_app = typer.Typer(help="Trials of candidates on live requests, before a release.", no_args_is_help=True)
ReasonOption = Annotated[str, typer.Option(help="Reason, for the history.")]
ActorOption = Annotated[str | None, typer.Option("--by", help="Name of the actor; by default the user's.")]
TrialArgument = Annotated[str, typer.Argument(metavar="TRIAL", help="Id of the trial, for instance t1.")]


def gate(
    name: ModelArgument,
    onnx: Annotated[Path, typer.Option(help="The candidate as an ONNX file.")],
    dataset: Annotated[
        str, typer.Option(help="Data set whose test split is evaluated; by default that of the newest run.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Check with the gate whether a file may replace the released version.

    The exit status is 2 for a candidate that fails, so that pipelines can use the command.
    """
    with Client() as client:
        verdict = client.judge(name, onnx, dataset=dataset)
    if as_json:
        print_json(to_record(verdict))
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(EXIT_FAILED)


def verdict(
    name: ModelArgument,
    verdict: Annotated[str, typer.Argument(metavar="VERDICT", help="Id of the verdict, from a release or an error.")],
    as_json: JsonOption = False,
) -> None:
    """Show a verdict of the gate."""
    with Client() as client:
        found = client.verdict(name, verdict)
    if as_json:
        print_json(to_record(found))
    else:
        print_verdict(found)


def print_verdict(verdict: GateVerdict) -> None:
    """Print every check of a verdict."""
    rows = [
        ("ok" if check.passed else "FAILED", check.kind.replace("_", " "), check.subject, check, check.rule)
        for check in verdict.checks
    ]
    outcome = "passed" if verdict.passed else f"{len(verdict.failed)} of {len(verdict.checks)} checks failed"
    caption = (
        f"candidate {verdict.digest[:12]} against version {verdict.base_version} of {verdict.model}: {outcome}; "
        "figures with 95 % intervals"
    )
    print_table(("", "check", "subject", "figure", "rule"), rows, caption=caption)


def release(
    run: RunArgument,
    correction: Annotated[str | None, typer.Option(help="Correction to release; by default the latest.")] = None,
    reason: ReasonOption = "",
    actor: ActorOption = None,
    approver: Annotated[
        str, typer.Option(help="Person who approves a candidate that fails the gate; needs a reason.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Release a correction that passes the gate as a new version."""
    with Client() as client:
        correction_id = correction or _latest_correction(client, run)
        released = client.release(run, correction_id, reason=reason, actor=actor, approver=approver)
    _print_release(released, as_json=as_json)


def _latest_correction(client: Client, run: str) -> str:
    """Return the latest succeeded correction of a run.

    Raises NotReady without one.
    """
    corrections = [correction for correction in client.corrections(run) if correction.state == "succeeded"]
    if not corrections:
        raise NotReady(f"run {run!r} has no finished correction; make one with `defuse correct {run} --wait`")
    return corrections[-1].id


def rollback(
    name: ModelArgument, reason: ReasonOption = "", actor: ActorOption = None, as_json: JsonOption = False
) -> None:
    """Restore the previous version of a model."""
    with Client() as client:
        restored = client.rollback(name, reason=reason, actor=actor)
    _print_release(restored, as_json=as_json)


def _print_release(released: Release, *, as_json: bool) -> None:
    if as_json:
        print_json(to_record(released))
    else:
        console.print(f"{released.model} now serves version {released.version} (before: {released.previous_version})")


def releases(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the releases of a model with actors and reasons."""
    with Client() as client:
        history = client.releases(name)
    if as_json:
        print_json([to_record(entry) for entry in history])
        return
    rows = [
        (
            entry.create_time.strftime(TIME_FORMAT),
            entry.kind.replace("_", " "),
            entry.version,
            entry.previous_version or "",
            entry.actor,
            entry.reason,
            f"failed, approved by {entry.approver}" if entry.approver else "passed" if entry.verdict else "",
        )
        for entry in history
    ]
    columns = ("time", "kind", "version", "previous version", "actor", "reason", "gate")
    print_table(columns, rows, caption="oldest first")


@trials_app.command(name="start")
def start_trial(
    run: RunArgument,
    correction: Annotated[
        str | None, typer.Option(help="Correction whose candidate is tried; by default the latest.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the requests through the gateway, in (0, 1].")] = 0.1,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only compare scores; by default the candidate responds to callers.")
    ] = False,
    reason: ReasonOption = "",
    actor: ActorOption = None,
    approver: Annotated[
        str, typer.Option(help="Person who approves a canary that fails the gate; needs a reason.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Try a correction's candidate on a share of the live requests."""
    with Client() as client:
        trial = client.start_trial(
            run,
            correction or _latest_correction(client, run),
            mode="shadow" if shadow else "canary",
            share=share,
            reason=reason,
            actor=actor,
            approver=approver,
        )
    _print_trial(trial, as_json=as_json)


@trials_app.command(name="list")
def list_trials(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List the trials of a model."""
    with Client() as client:
        trials = client.trials(name)
    if as_json:
        print_json([to_record(trial) for trial in trials])
        return
    rows = [
        (trial.id, trial.state, trial.mode, f"{trial.share:g}", trial.correction, trial.actor, trial.reason)
        for trial in trials
    ]
    columns = ("trial", "state", "mode", "share", "correction", "actor", "reason")
    print_table(columns, rows, caption="oldest first")


@trials_app.command(name="show")
def show_trial(name: ModelArgument, trial: TrialArgument, as_json: JsonOption = False) -> None:
    """Show the counts of a trial."""
    with Client() as client:
        _print_trial(client.trial(name, trial), as_json=as_json)


@trials_app.command(name="stop")
def stop_trial(name: ModelArgument, trial: TrialArgument, as_json: JsonOption = False) -> None:
    """End a trial."""
    with Client() as client:
        _print_trial(client.stop_trial(name, trial), as_json=as_json)


def _print_trial(trial: Trial, *, as_json: bool) -> None:
    if as_json:
        print_json(to_record(trial))
        return
    counts = trial.counts
    rows = [
        ("champion", counts.champion_requests, f"{counts.champion_ms:.2f}", ""),
        ("challenger", counts.challenger_requests, f"{counts.challenger_ms:.2f}", counts.challenger_errors),
    ]
    caption = f"{trial.mode} {trial.id} of {trial.model}, {trial.state}: {trial.correction}, share {trial.share:g}"
    print_table(("", "requests", "mean ms", "errors"), rows, caption=caption)
    if trial.mode == "shadow":
        console.print(
            f"{counts.agreed} of {counts.compared} images got the same class; {counts.dropped} sampled requests were "
            "not compared"
        )
