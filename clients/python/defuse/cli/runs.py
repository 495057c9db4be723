"""`defuse runs`: searches for failures."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from defuse.cli.output import JsonOption, Show, console, print_json, print_table, progress, record
from defuse.cli.run_options import RunOptions, taking_run_options
from defuse.client import Client
from defuse.pictures import read_picture, write_animation
from defuse.report import write_report
from defuse.values import Dataset, Failure, Run

app = typer.Typer(help="Searches for failures.", no_args_is_help=True)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
FAILED = 2


@app.command()
@taking_run_options
def create(
    run: RunOptions,
    *,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default model and time.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run. With --wait the exit status is 2 when it does not succeed."""
    name = name or f"{run.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Client() as client:
        dataset = _upload(client, run.data, run.seed)
        created = client.create_run(name, model=run.model, dataset=dataset.id, **run.settings())
        if wait:
            created = _wait(client, name)
    _print(created, as_json=as_json)
    _exit_unless_well(created)


@app.command()
@taking_run_options
def estimate(run: RunOptions, *, as_json: JsonOption = False) -> None:
    """Say what a run would cost, from a few seconds of the real work, without starting it."""
    with Client() as client:
        dataset = _upload(client, run.data, run.seed)
        cost = client.estimate_run(model=run.model, dataset=dataset.id, **run.settings())
    if as_json:
        print_json(record(cost))
        return
    facts = {
        "images": cost.sources,
        "perturbations": f"up to {cost.decodes}, {cost.decodes_per_s:.0f} a second",
        "training of the VAE": f"{cost.training_s:.0f} s" if cost.training_s else "none, it is there",
        "search": f"about {cost.search_s:.0f} s with one generator",
    }
    print_table(("a run of", run.model), list(facts.items()), caption="")


@app.command()
def validity(name: RunArgument, as_json: JsonOption = False) -> None:
    """Say which validity thresholds a run's annotations advise; --validity-from takes them for another run."""
    with Client() as client:
        run, advice = client.run(name), client.advise_validity(name)
    if as_json:
        print_json(record(advice))
        return
    rows = [(key, f"{run.config['validity'][key]:g}", f"{value:g}") for key, value in advice.validity.items()]
    print_table(
        ("threshold", name, "advised"),
        rows,
        caption=(
            f"rejects {advice.invalid_rejected:.2f} of the failures of {advice.invalid_regions} invalid regions and "
            f"{advice.valid_rejected:.2f} of those of {advice.valid_regions} labelled ones; each region counts the same"
        ),
    )


@app.command()
def failures(name: RunArgument, as_json: JsonOption = False) -> None:
    """Print a run's failures as they are found, one a line; --json prints all that is known of each."""
    with Client() as client:
        classes = client.model(client.run(name).model).classes
        for batch in client.failures(name):
            for failure in batch.failures:
                sys.stdout.write(f"{_line(failure, classes, as_json=as_json)}\n")
            sys.stdout.flush()


@app.command()
def interpolate(
    name: RunArgument,
    first: Annotated[Path, typer.Argument(help="Picture where the walk begins.")],
    last: Annotated[Path, typer.Argument(help="Picture where it ends.")],
    out: Annotated[Path, typer.Option(help="Animation to write.")] = Path("walk.gif"),
    frames: Annotated[int, typer.Option(help="Frames, both ends included.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Animate the walk in latent space between two pictures, each frame with what the model answers."""
    with Client() as client:
        run = client.run(name)
        model = client.model(run.model)
        shape = model.image_shape
        walk = client.latent_space(name).interpolate(
            read_picture(first, shape), read_picture(last, shape), frames=frames
        )
    labels = [model.classes[label] for label in walk.predicted_labels]
    write_animation(out, walk.images, labels)
    if as_json:
        print_json({"animation": str(out), "predicted_labels": labels})
    else:
        console.print(f"{len(labels)} frames, answered {' '.join(labels)}: {out.resolve()}", soft_wrap=True)


@app.command()
def watch(name: RunArgument, as_json: JsonOption = False) -> None:
    """Show how a run goes on until it has ended. The exit status is 2 when it does not succeed."""
    with Client() as client:
        run = _wait(client, name)
    _print(run, as_json=as_json)
    _exit_unless_well(run)


@app.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List the runs."""
    with Client() as client:
        runs = client.runs()
    if as_json:
        print_json([record(run) for run in runs])
        return
    rows = [(run.id, run.model, run.model_version, run.state, run.counts.failures, run.region_count) for run in runs]
    print_table(("run", "model", "version", "state", "failures", "regions"), rows, caption="newest first")


@app.command()
def show(name: RunArgument, as_json: JsonOption = False) -> None:
    """Show a run."""
    with Client() as client:
        _print(client.run(name), as_json=as_json)


@app.command()
def cancel(name: RunArgument, as_json: JsonOption = False) -> None:
    """Stop a run."""
    with Client() as client:
        _print(client.cancel_run(name), as_json=as_json)


def report(
    name: RunArgument, out: Annotated[Path, typer.Option(help="Directory to write to.")], as_json: JsonOption = False
) -> None:
    """Write the report of a run: an HTML page with the pictures and a JSON file with the numbers."""
    with Client() as client:
        page = write_report(client, name, out)
    if as_json:
        print_json({"html": str(page), "json": str(page.with_suffix(".json"))})
    else:
        console.print(f"report: {page.resolve()}", soft_wrap=True)


def _upload(client: Client, data: str, seed: int) -> Dataset:
    with progress() as bar:
        return client.add_dataset(
            data, seed=seed, on_progress=lambda sent, total: bar("uploading", sent / total, f"{sent >> 10} KiB")
        )


def _wait(client: Client, name: str) -> Run:
    with progress() as bar:
        return client.wait_for_run(name, on_change=lambda run: _show_run(bar, run))


def _show_run(bar: Show, run: Run) -> None:
    bar(run.state, run.progress, run.note)


def _print(run: Run, *, as_json: bool) -> None:
    if as_json:
        print_json(record(run))
        return
    facts: dict[str, Any] = {
        "state": run.state,
        "model": f"{run.model} version {run.model_version}",
        "preflight": _preflight(run),
        "failures": run.counts.failures,
        "regions": run.region_count,
        "note": run.error or run.note,
    }
    print_table((run.id, ""), list(facts.items()), caption="")


def _preflight(run: Run) -> str:
    if not run.preflight:
        return "under way"
    return f"accuracy {run.preflight.accuracy}, on reconstructions {run.preflight.reconstruction_accuracy}"


def _line(failure: Failure, classes: Sequence[str], *, as_json: bool) -> str:
    true, predicted = classes[failure.true_label], classes[failure.predicted_label]
    if as_json:
        words = {"true_label": true, "predicted_label": predicted}
        return json.dumps({**vars(failure), **words, "latent": failure.latent.tolist()})
    return (
        f"source {failure.source} round {failure.round} draw {failure.draw}: {true} taken for {predicted}, "
        f"margin {failure.margin:.2f}"
    )


def _exit_unless_well(run: Run) -> None:
    if run.ended and run.state != "succeeded":
        raise typer.Exit(FAILED)
