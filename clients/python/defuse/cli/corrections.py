"""`defuse correct` and `defuse corrections`: fine-tuning on labelled regions."""

from pathlib import Path
from typing import Annotated

import typer

from defuse.calls.corrections import METHODS
from defuse.cli.output import (
    EXIT_FAILED,
    JsonOption,
    RunArgument,
    console,
    parse_numbers,
    parse_words,
    print_json,
    print_table,
    progress,
    to_record,
)
from defuse.cli.releases import print_verdict
from defuse.client import Client
from defuse.values import Correction

app = typer.Typer(help="Corrections of the deployed weights.", no_args_is_help=True)
CorrectionArgument = Annotated[str, typer.Argument(metavar="CORRECTION", help="Id of the correction, for instance c1.")]


def correct(
    run: RunArgument,
    region_weights: Annotated[
        str, typer.Option("--lambda", help="Weights of the regions in the loss, each in [0, 1), as in 0.1,0.3,0.5.")
    ] = "",
    methods: Annotated[
        str, typer.Option("--method", help=f"Methods, separated by commas, of {', '.join(METHODS)}; or `all`.")
    ] = "",
    epochs: Annotated[int, typer.Option(help="Largest number of epochs; 0 takes the default.")] = 0,
    learning_rates: Annotated[str, typer.Option("--learning-rate", help="Peak learning rates, as in 1e-4,1e-3.")] = "",
    margin: Annotated[float, typer.Option(help="Largest accepted loss of test accuracy; 0 takes the default.")] = 0.0,
    max_shift: Annotated[float, typer.Option(help="Largest shift of training images, as a share of the side.")] = 0.0,
    max_rotation: Annotated[float, typer.Option(help="Largest rotation of training images, in degrees.")] = 0.0,
    flip: Annotated[bool, typer.Option("--flip", help="Flip half of the training images horizontally.")] = False,
    torch_factory: Annotated[
        str, typer.Option(help="module:function that builds the classifier in torch, installed at the corrector.")
    ] = "",
    weights: Annotated[Path | None, typer.Option(help="State dict of the factory's module, as safetensors.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end of the correction.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the deployed weights on the labelled regions of a run.

    Several methods are tried; the best result becomes the candidate. With --wait the
    exit status is 2 for a correction that does not succeed.
    """
    with Client() as client:
        correction = client.create_correction(
            run,
            region_weights=parse_numbers("--lambda", region_weights),
            learning_rates=parse_numbers("--learning-rate", learning_rates),
            methods=METHODS if methods == "all" else parse_words(methods),
            epochs=epochs,
            margin=margin,
            augmentation={"max_shift": max_shift, "max_rotation_degrees": max_rotation, "horizontal_flip": flip},
            torch_factory=torch_factory,
            weights=weights,
            seed=seed,
        )
        if wait:
            correction = _wait(client, run, correction.id)
    _print_correction(correction, as_json=as_json)
    _exit_if_failed(correction)


@app.command(name="list")
def list_(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the corrections of a run."""
    with Client() as client:
        corrections = client.corrections(run)
    if as_json:
        print_json([to_record(correction) for correction in corrections])
        return
    rows = [
        (
            correction.id,
            correction.state,
            correction.base_version,
            len(correction.points),
            correction.test_after,
            correction.regions_after,
        )
        for correction in corrections
    ]
    columns = ("correction", "state", "base version", "points", "test images", "held-out region images")
    print_table(columns, rows, caption="oldest first; accuracy of the candidate with 95 % intervals")


@app.command()
def show(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Show a correction: its points, its choice and its effects."""
    with Client() as client:
        _print_correction(client.correction(run, correction), as_json=as_json)


@app.command()
def watch(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Show the progress of a correction until its end.

    The exit status is 2 for a correction that does not succeed.
    """
    with Client() as client:
        found = _wait(client, run, correction)
    _print_correction(found, as_json=as_json)
    _exit_if_failed(found)


@app.command()
def cancel(run: RunArgument, correction: CorrectionArgument, as_json: JsonOption = False) -> None:
    """Cancel a correction."""
    with Client() as client:
        _print_correction(client.cancel_correction(run, correction), as_json=as_json)


def _wait(client: Client, run: str, correction: str) -> Correction:
    with progress() as bar:
        return client.wait_for_correction(
            run, correction, on_change=lambda changed: bar("correcting", changed.progress, changed.note)
        )


def _exit_if_failed(correction: Correction) -> None:
    if correction.state in {"failed", "cancelled"}:
        raise typer.Exit(EXIT_FAILED)


def _print_correction(correction: Correction, *, as_json: bool) -> None:
    if as_json:
        print_json(to_record(correction))
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
        console.print("no point is non-inferior on the test images by the margin: check it before a release")
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
    caption = "* is the chosen point. Region images are those that decide; test images: after minus before"
    if correction.choice:
        caption += f".\nRule: {correction.choice.rule}"
    columns = ("", "method", "lambda", "rate", "share", "region images", "region loss", "test images")
    print_table(columns, rows, caption=caption)


def _print_changes(correction: Correction) -> None:
    rows = [
        ("test images", correction.test_before, correction.test_after),
        ("held-out region images", correction.regions_before, correction.regions_after),
        *((f"  {change.region} ({change.label})", change.before, change.after) for change in correction.regions),
    ]
    caption = f"correction {correction.id} of {correction.run}; 95 % intervals; the choice used none of these images"
    print_table(("accuracy on", f"version {correction.base_version}", "candidate"), rows, caption=caption)
