"""`defuse correct`, `release` and `rollback`: from regions to a new version, and back."""

from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, progress, record
from defuse.cli.runs import FAILED, RunArgument
from defuse.client import Client
from defuse.errors import NotReady
from defuse.values import Correction, Release


def correct(
    run: RunArgument,
    region_weight: Annotated[
        float, typer.Option("--lambda", help="Weight of the regions in the loss, in [0, 1).")
    ] = 0.3,
    epochs: Annotated[int, typer.Option(help="Passes over the training data; 0 takes the default.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate; 0 takes the default.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of batches and samples.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the correction has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the deployed weights on the labelled regions. With --wait the exit status is 2 when it fails."""
    with Client() as client:
        correction = client.create_correction(
            run, region_weight=region_weight, epochs=epochs, learning_rate=learning_rate, seed=seed
        )
        if wait:
            with progress() as bar:
                correction = client.wait_for_correction(
                    run, correction.id, on_change=lambda now: bar("correcting", now.progress, now.note)
                )
    if as_json:
        print_json(record(correction))
    else:
        _print(correction)
    if correction.state == "failed":
        raise typer.Exit(FAILED)


def release(
    run: RunArgument,
    correction: Annotated[str | None, typer.Option(help="Correction to publish; by default the latest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a correction as a new version of its model."""
    with Client() as client:
        _print_release(client.release(run, correction or _latest(client, run)), as_json=as_json)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")], as_json: JsonOption = False
) -> None:
    """Give callers of a model the version before the present one."""
    with Client() as client:
        _print_release(client.rollback(name), as_json=as_json)


def _latest(client: Client, run: str) -> str:
    corrections = [correction for correction in client.corrections(run) if correction.state == "succeeded"]
    if not corrections:
        raise NotReady(f"run {run!r} has no finished correction; make one with `defuse correct {run} --wait`")
    return corrections[-1].id


def _print(correction: Correction) -> None:
    if correction.state != "succeeded":
        console.print(f"correction {correction.id} of {correction.run}: {correction.state} {correction.error}")
        return
    rows = [
        ("test images", correction.test_before, correction.test_after),
        ("held-out region images", correction.regions_before, correction.regions_after),
        *((f"  {change.region} ({change.label})", change.before, change.after) for change in correction.regions),
    ]
    caption = f"correction {correction.id} of {correction.run}, lambda {correction.region_weight:g}; 95 % intervals"
    print_table(("accuracy on", f"version {correction.base_version}", "candidate"), rows, caption=caption)


def _print_release(done: Release, *, as_json: bool) -> None:
    if as_json:
        print_json(record(done))
    else:
        console.print(f"callers of {done.model} get version {done.version} (before: {done.previous_version})")
