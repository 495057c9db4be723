"""`defuse correct` and `corrections`: from regions to new weights."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.cli.output import JsonOption, console, print_json, print_table, progress, record
from defuse.cli.releases import print_verdict
from defuse.cli.runs import FAILED, RunArgument
from defuse.client import Client
from defuse.correction_settings import METHODS
from defuse.errors import InvalidInput
from defuse.values import Correction

app = typer.Typer(help="Corrections of the deployed weights.", no_args_is_help=True)
CorrectionArgument = Annotated[str, typer.Argument(metavar="CORRECTION", help="For instance c1.")]


def correct(
    run: RunArgument,
    region_weights: Annotated[
        str, typer.Option("--lambda", help="Weights of the regions in the loss to try, in [0, 1), as in 0.1,0.3,0.5.")
    ] = "",
    methods: Annotated[
        str, typer.Option("--method", help=f"Ways to try, separated by commas, of {', '.join(METHODS)}; or `all`.")
    ] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the training data at most; 0 takes the default.")] = 0,
    learning_rates: Annotated[str, typer.Option("--learning-rate", help="Peak rates to try, as in 1e-4,1e-3.")] = "",
    margin: Annotated[float, typer.Option(help="Loss of test accuracy that is accepted; 0 takes the default.")] = 0.0,
    max_shift: Annotated[float, typer.Option(help="Shift training images by up to this share of the side.")] = 0.0,
    max_rotation: Annotated[float, typer.Option(help="Turn training images by up to so many degrees.")] = 0.0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images left to right.")] = False,
    torch_factory: Annotated[
        str, typer.Option(help="module:function that builds the classifier in torch, known to the corrector.")
    ] = "",
    weights: Annotated[Path | None, typer.Option(help="Its weights: safetensors of the state dict.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of batches and samples.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the correction has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the deployed weights on the labelled regions, in several ways; the best one becomes the candidate.

    With --wait the exit status is 2 when it does not succeed.
    """
    with Client() as client:
        correction = client.create_correction(
            run,
            region_weights=_numbers("--lambda", region_weights),
            learning_rates=_numbers("--learning-rate", learning_rates),
            methods=METHODS if methods == "all" else _words(methods),
            epochs=epochs,
            margin=margin,
            augmentation={"max_shift": max_shift, "max_rotation_degrees": max_rotation, "horizontal_flip": flip},
            torch_factory=torch_factory,
            weights=weights,
            seed=seed,
        )
        if wait:
            correction = _wait(client, run, correction.id)
    _print(correction, as_json=as_json)
    _exit_unless_well(correction)


@app.command(name="list")
def list_(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the corrections of a run."""
    with Client() as client:
        corrections = client.corrections(run)
    if as_json:
        print_json([record(correction) for correction in corrections])
        return
    rows = [
        (one.id, one.state, one.base_version, len(one.points), one.test_after, one.regions_after) for one in corrections
    ]
    columns = ("correction", "state", "of version", "points", "test images", "held-out region images")
    print_table(columns, rows, caption="oldest first; accuracy of the candidate with 95 % intervals")


@app.command()
def show(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Show a correction: what was tried, what was chosen and why, and what it changed."""
    with Client() as client:
        _print(client.correction(run, correction), as_json=as_json)


@app.command()
def watch(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Show how a correction goes on until it has ended. The exit status is 2 when it does not succeed."""
    with Client() as client:
        found = _wait(client, run, correction)
    _print(found, as_json=as_json)
    _exit_unless_well(found)


@app.command()
def cancel(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Stop a correction."""
    with Client() as client:
        _print(client.cancel_correction(run, correction), as_json=as_json)


def _words(listed: str) -> list[str]:
    return [word.strip() for word in listed.split(",") if word.strip()]


def _numbers(option: str, listed: str) -> list[float]:
    try:
        return [float(word) for word in _words(listed)]
    except ValueError as error:
        raise InvalidInput(f"{option} {listed!r} is no list of numbers; write for instance 0.1,0.3,0.5") from error


def _wait(client: Client, run: str, correction: str) -> Correction:
    with progress() as bar:
        return client.wait_for_correction(
            run, correction, on_change=lambda now: bar("correcting", now.progress, now.note)
        )


def _exit_unless_well(correction: Correction) -> None:
    if correction.state in {"failed", "cancelled"}:
        raise typer.Exit(FAILED)


def _print(correction: Correction, *, as_json: bool) -> None:
    if as_json:
        print_json(record(correction))
        return
    if correction.points:
        _print_points(correction)
    for failure in correction.failures:
        console.print(f"failed: {failure}", markup=False)
    if correction.choice is None:
        status = f"{correction.state} {correction.error or correction.note}".rstrip()
        console.print(f"correction {correction.id} of {correction.run}: {status}", markup=False)
        return
    _print_changes(correction)
    if not correction.choice.non_inferior:
        console.print("no point is non-inferior on the test images by the margin: look before you release it")
    if correction.verdict:
        print_verdict(correction.verdict)


def _print_points(correction: Correction) -> None:
    rows = [
        (
            "*" if point.chosen else "",
            point.method,
            f"{point.region_weight:g}",
            f"{point.learning_rate:g}",
            f"{point.share:g}",
            point.regions,
            f"{point.regions_loss:.4f}",
            point.test_change,
        )
        for point in correction.points
    ]
    caption = "as tried; * was chosen. Region images are those that decide; test images: after minus before"
    if correction.choice:
        caption += f".\nRule: {correction.choice.rule}"
    print_table(
        ("", "method", "lambda", "rate", "share", "region images", "their loss", "test images"), rows, caption=caption
    )


def _print_changes(correction: Correction) -> None:
    rows = [
        ("test images", correction.test_before, correction.test_after),
        ("held-out region images", correction.regions_before, correction.regions_after),
        *((f"  {change.region} ({change.label})", change.before, change.after) for change in correction.regions),
    ]
    caption = f"correction {correction.id} of {correction.run}; 95 % intervals; region images had no part in the choice"
    print_table(("accuracy on", f"version {correction.base_version}", "candidate"), rows, caption=caption)
