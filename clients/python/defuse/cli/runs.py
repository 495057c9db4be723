"""`defuse runs` and `defuse report`: searches for failures."""

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from defuse.cli.output import (
    EXIT_FAILED,
    JsonOption,
    RunArgument,
    console,
    print_json,
    print_table,
    progress,
    to_record,
)
from defuse.client import Client
from defuse.pictures import read_picture, write_animation
from defuse.report import write_report
from defuse.values import Dataset, Failure, Run

app = typer.Typer(help="Searches for failures.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `defuse runs create` and `defuse runs estimate`."""

    model: Annotated[str, typer.Option(help="Model under test.")]
    data: Annotated[str, typer.Option(help="Class folders, an .npz, or a URL that the services can read.")]
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0
    model_version: Annotated[int, typer.Option(help="Version under test; 0 takes the released one.")] = 0
    radius: Annotated[
        float, typer.Option(help="Perturbation radius in latent standard deviations; 0 takes the default.")
    ] = 0.0
    draws: Annotated[int, typer.Option(help="Budget: mean perturbations per image; 0 takes the default.")] = 0
    max_sources: Annotated[int, typer.Option(help="Number of source images; 0 takes all.")] = 0
    strategy: Annotated[str, typer.Option(help="Allocation of draws to images: `adaptive` or `uniform`.")] = "adaptive"
    noise: Annotated[str, typer.Option(help="Distribution of perturbations: `gaussian` or `released`.")] = "gaussian"
    rendering: Annotated[
        str,
        typer.Option(help="Images: `decoder`, `residual` (changed real images), or what a pilot chooses, `auto`."),
    ] = "auto"
    vae_epochs: Annotated[int, typer.Option(help="Epochs of the VAE; 0 chooses them by the size of the data.")] = 0
    encoder: Annotated[Path | None, typer.Option(help="Your own ONNX encoder; needs --decoder.")] = None
    decoder: Annotated[Path | None, typer.Option(help="Your own ONNX decoder; needs --encoder.")] = None
    label_model: Annotated[
        str, typer.Option(help="Model of the labels of perturbations: of `latent`s, of `image`s, or `auto`.")
    ] = "auto"
    min_label_probability: Annotated[
        float | None,
        typer.Option(help="Least probability of the source's label by the label model; default 0.998, of images 0.97."),
    ] = None
    validity_from: Annotated[
        str, typer.Option(help="Run whose annotations advise the omitted validity thresholds.")
    ] = ""
    oracle: Annotated[str, typer.Option(help="Model that must predict the source's label for every failure.")] = ""
    declared_accuracy: Annotated[
        float | None, typer.Option(help="Refuse the run if the measured accuracy of the model is lower; default 0.5.")
    ] = None
    max_reconstruction_loss: Annotated[
        float | None,
        typer.Option(help="Refuse the run if the VAE loses a larger share of the images; default 0.1."),
    ] = None
    min_support: Annotated[int, typer.Option(help="Least source images of a region; 0 takes the default.")] = 0
    mixture: Annotated[
        str,
        typer.Option(help="`error_aware`: one confusion per region; `plain`: over latents alone, as published."),
    ] = "error_aware"

    def settings(self) -> dict[str, Any]:
        """Return all options but model and data as settings of the client."""
        return {
            "seed": self.seed,
            "model_version": self.model_version,
            "search": {
                "radius_sd": self.radius,
                "draws_per_source": self.draws,
                "max_sources": self.max_sources,
                "strategy": self.strategy,
                "noise": self.noise,
                "rendering": self.rendering,
            },
            "vae": {"epochs": self.vae_epochs, "encoder": self.encoder, "decoder": self.decoder},
            "validity": {
                "label_model": self.label_model,
                "min_label_probability": self.min_label_probability,
                "oracle": self.oracle,
            },
            "validity_from": self.validity_from,
            "preflight": {
                "declared_accuracy": self.declared_accuracy,
                "max_reconstruction_loss": self.max_reconstruction_loss,
            },
            "mixture": {"min_support": self.min_support, "kind": self.mixture},
        }


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add run options to a command, which receives `RunOptions` first."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        run = RunOptions(**{field.name: values.pop(field.name) for field in fields(RunOptions)})
        command(run, **values)

    _, *own = inspect.signature(command).parameters.values()
    parameters = [*inspect.signature(RunOptions).parameters.values(), *own]
    # Typer reads both attributes.
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


@app.command()
@with_run_options
def create(
    run: RunOptions,
    *,
    name: Annotated[str | None, typer.Option(help="Id of the run; by default model and time.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end of the run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run.

    With --wait the exit status is 2 for a run that does not succeed.
    """
    name = name or f"{run.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Client() as client:
        dataset = _upload(client, run.data, run.seed)
        created = client.create_run(name, model=run.model, dataset=dataset.id, **run.settings())
        if wait:
            created = _wait(client, name)
    _print_run(created, as_json=as_json)
    _exit_unless_succeeded(created)


@app.command()
@with_run_options
def estimate(run: RunOptions, *, as_json: JsonOption = False) -> None:
    """Estimate the cost of a run in a few seconds."""
    with Client() as client:
        dataset = _upload(client, run.data, run.seed)
        cost = client.estimate_run(model=run.model, dataset=dataset.id, **run.settings())
    if as_json:
        print_json(to_record(cost))
        return
    facts = {
        "images": cost.sources,
        "perturbations": f"up to {cost.decodes}, {cost.decodes_per_s:.0f} per second",
        "training of the VAE": f"{cost.training_s:.0f} s" if cost.training_s else "none, already trained",
        "search": f"about {cost.search_s:.0f} s with one generator",
    }
    print_table(("a run of", run.model), list(facts.items()), caption="")


@app.command()
def validity(name: RunArgument, as_json: JsonOption = False) -> None:
    """Show validity thresholds derived from the annotations of a run.

    --validity-from of `defuse runs create` applies them.
    """
    with Client() as client:
        run, advice = client.run(name), client.advise_validity(name)
    if as_json:
        print_json(to_record(advice))
        return
    rows = [(key, f"{run.config['validity'][key]:g}", f"{value:g}") for key, value in advice.validity.items()]
    caption = (
        f"rejects {advice.invalid_rejected:.2f} of the failures of {advice.invalid_regions} invalid regions and "
        f"{advice.valid_rejected:.2f} of those of {advice.valid_regions} labelled regions; all regions weigh the same"
    )
    print_table(("threshold", name, "advised"), rows, caption=caption)


@app.command()
def failures(name: RunArgument, as_json: JsonOption = False) -> None:
    """Print the failures of a run while the search finds them.

    Each failure is one line. --json prints every field.
    """
    with Client() as client:
        classes = client.model(client.run(name).model).classes
        for batch in client.failures(name):
            for failure in batch.failures:
                sys.stdout.write(f"{_failure_line(failure, classes, as_json=as_json)}\n")
            sys.stdout.flush()


def _failure_line(failure: Failure, classes: Sequence[str], *, as_json: bool) -> str:
    true, predicted = classes[failure.true_label], classes[failure.predicted_label]
    if as_json:
        class_names = {"true_label": true, "predicted_label": predicted}
        return json.dumps({**vars(failure), **class_names, "latent": failure.latent.tolist()})
    return (
        f"source {failure.source} round {failure.round} draw {failure.draw}: {true} predicted as {predicted}, "
        f"margin {failure.margin:.2f}"
    )


@app.command()
def interpolate(
    name: RunArgument,
    first: Annotated[Path, typer.Argument(help="First image.")],
    last: Annotated[Path, typer.Argument(help="Last image.")],
    out: Annotated[Path, typer.Option(help="GIF to write.")] = Path("walk.gif"),
    frames: Annotated[int, typer.Option(help="Number of frames, both ends included.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Animate the interpolation between two images in latent space.

    Each frame shows the predicted class.
    """
    with Client() as client:
        run = client.run(name)
        model = client.model(run.model)
        ends = read_picture(first, model.image_shape), read_picture(last, model.image_shape)
        interpolation = client.latent_space(name).interpolate(*ends, frames=frames)
    labels = [model.classes[label] for label in interpolation.predicted_labels]
    write_animation(out, interpolation.images, labels)
    if as_json:
        print_json({"animation": str(out), "predicted_labels": labels})
    else:
        console.print(f"{len(labels)} frames, predicted {' '.join(labels)}: {out.resolve()}", soft_wrap=True)


@app.command()
def watch(name: RunArgument, as_json: JsonOption = False) -> None:
    """Show the progress of a run until its end.

    The exit status is 2 for a run that does not succeed.
    """
    with Client() as client:
        run = _wait(client, name)
    _print_run(run, as_json=as_json)
    _exit_unless_succeeded(run)


@app.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List the runs."""
    with Client() as client:
        runs = client.runs()
    if as_json:
        print_json([to_record(run) for run in runs])
        return
    rows = [(run.id, run.model, run.model_version, run.state, run.counts.failures, run.region_count) for run in runs]
    print_table(("run", "model", "version", "state", "failures", "regions"), rows, caption="newest first")


@app.command()
def show(name: RunArgument, as_json: JsonOption = False) -> None:
    """Show a run."""
    with Client() as client:
        _print_run(client.run(name), as_json=as_json)


@app.command()
def cancel(name: RunArgument, as_json: JsonOption = False) -> None:
    """Cancel a run."""
    with Client() as client:
        _print_run(client.cancel_run(name), as_json=as_json)


def report(
    name: RunArgument, out: Annotated[Path, typer.Option(help="Directory to write to.")], as_json: JsonOption = False
) -> None:
    """Write a run's report: an HTML page and a JSON file."""
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
        return client.wait_for_run(name, on_change=lambda run: bar(run.state, run.progress, run.note))


def _print_run(run: Run, *, as_json: bool) -> None:
    if as_json:
        print_json(to_record(run))
        return
    facts: dict[str, Any] = {
        "state": run.state,
        "model": f"{run.model} version {run.model_version}",
        "preflight": _preflight(run),
        "rendering": _rendering(run),
        "failures": run.counts.failures,
        "regions": run.region_count,
        "note": run.error or run.note,
    }
    print_table((run.id, ""), list(facts.items()), caption="")


def _preflight(run: Run) -> str:
    if not run.preflight:
        return "not finished"
    return f"accuracy {run.preflight.accuracy}, on reconstructions {run.preflight.reconstruction_accuracy}"


def _rendering(run: Run) -> str:
    if not run.preflight or not run.preflight.pilot:
        return run.rendering
    pilot = run.preflight.pilot
    return (
        f"{run.rendering}, by a pilot on {pilot.sources} images: {pilot.reconstructions_lost.value:.1%} lost to "
        f"reconstruction; valid among misclassified images {pilot.decoder_valid.value:.2f} (decoder), "
        f"{pilot.residual_valid.value:.2f} (residual)"
    )


def _exit_unless_succeeded(run: Run) -> None:
    if run.ended and run.state != "succeeded":
        raise typer.Exit(EXIT_FAILED)
