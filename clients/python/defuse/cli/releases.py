"""`defuse gate`, `release`, `rollback` and `releases`: which version callers get, who says so, and why."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, record
from defuse.cli.runs import FAILED, RunArgument
from defuse.client import Client
from defuse.errors import NotReady
from defuse.values import GateVerdict, Release

ModelArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the history.")]
ActorOption = Annotated[str | None, typer.Option("--by", help="Who asks for it; by default the user's name.")]


def gate(
    name: ModelArgument,
    onnx: Annotated[Path, typer.Option(help="The candidate as an ONNX file.")],
    dataset: Annotated[
        str, typer.Option(help="Data set whose test split is asked about; by default that of the newest run.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Ask whether a file may take the place of the version that callers of a model get.

    For the pipelines of other teams: the exit status is 2 when it does not pass.
    """
    with Client() as client:
        verdict = client.judge(name, onnx, dataset=dataset)
    if as_json:
        print_json(record(verdict))
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise typer.Exit(FAILED)


def verdict(
    name: ModelArgument,
    verdict: Annotated[str, typer.Argument(metavar="VERDICT", help="As a release or a refusal names it.")],
    as_json: JsonOption = False,
) -> None:
    """Show what the gate said."""
    with Client() as client:
        found = client.verdict(name, verdict)
    if as_json:
        print_json(record(found))
    else:
        print_verdict(found)


def release(
    run: RunArgument,
    correction: Annotated[str | None, typer.Option(help="Correction to publish; by default the latest.")] = None,
    reason: ReasonOption = "",
    actor: ActorOption = None,
    approver: Annotated[
        str, typer.Option(help="Who lets it through although it does not pass the gate; needs a reason.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Publish a correction that passes the gate as a new version of its model."""
    with Client() as client:
        done = client.release(
            run, correction or latest_correction(client, run), reason=reason, actor=actor, approver=approver
        )
    _print(done, as_json=as_json)


def rollback(
    name: ModelArgument, reason: ReasonOption = "", actor: ActorOption = None, as_json: JsonOption = False
) -> None:
    """Give callers of a model the version before the present one."""
    with Client() as client:
        done = client.rollback(name, reason=reason, actor=actor)
    _print(done, as_json=as_json)


def releases(name: ModelArgument, as_json: JsonOption = False) -> None:
    """List which versions callers of a model got, since when, by whom and why."""
    with Client() as client:
        found = client.releases(name)
    if as_json:
        print_json([record(one) for one in found])
        return
    rows = [
        (
            one.create_time.strftime("%Y-%m-%d %H:%M:%S UTC"),
            one.kind.replace("_", " "),
            one.version,
            one.previous_version or "",
            one.actor,
            one.reason,
            f"failed, approved by {one.approver}" if one.approver else "passed" if one.verdict else "",
        )
        for one in found
    ]
    columns = ("when", "what", "version", "instead of", "by", "why", "gate")
    print_table(columns, rows, caption="oldest first")


def print_verdict(verdict: GateVerdict) -> None:
    """Print every check of a verdict."""
    rows = [
        ("ok" if check.passed else "FAILED", check.kind.replace("_", " "), check.subject, check, check.rule)
        for check in verdict.checks
    ]
    outcome = "passed" if verdict.passed else f"{len(verdict.failed)} of {len(verdict.checks)} checks failed"
    print_table(
        ("", "check", "of", "figure", "rule"),
        rows,
        caption=f"candidate {verdict.digest[:12]} beside version {verdict.base_version} of {verdict.model}: {outcome}; "
        "figures with 95 % intervals",
    )


def latest_correction(client: Client, run: str) -> str:
    """Return the latest correction of a run that has succeeded; raise NotReady where there is none."""
    corrections = [correction for correction in client.corrections(run) if correction.state == "succeeded"]
    if not corrections:
        raise NotReady(f"run {run!r} has no finished correction; make one with `defuse correct {run} --wait`")
    return corrections[-1].id


def _print(done: Release, *, as_json: bool) -> None:
    if as_json:
        print_json(record(done))
    else:
        console.print(f"callers of {done.model} get version {done.version} (before: {done.previous_version})")
