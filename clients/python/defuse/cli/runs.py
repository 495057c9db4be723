"""`defuse runs`: searches for failures."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from defuse.cli.output import JsonOption, Show, console, print_json, print_table, progress, record
from defuse.client import Client
from defuse.report import write_report
from defuse.values import Dataset, Run

app = typer.Typer(help="Searches for failures.", no_args_is_help=True)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
FAILED = 2


@app.command()
def create(
    model: Annotated[str, typer.Option(help="Model under test.")],
    data: Annotated[str, typer.Option(help="Class folders, an .npz, or a URL that the services can read.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; by default model and time.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    model_version: Annotated[int, typer.Option(help="Version under test; 0 takes the one that callers get.")] = 0,
    radius: Annotated[float, typer.Option(help="Step size in latent standard deviations; 0 takes the default.")] = 0.0,
    draws: Annotated[int, typer.Option(help="Perturbations per image; 0 takes the default.")] = 0,
    max_sources: Annotated[int, typer.Option(help="Images to search around; 0 takes all.")] = 0,
    vae_epochs: Annotated[int, typer.Option(help="Epochs of the VAE; 0 takes what fits the data.")] = 0,
    min_support: Annotated[int, typer.Option(help="Failures that make a region; 0 takes the default.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run. With --wait the exit status is 2 when it does not succeed."""
    name = name or f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Client() as client:
        dataset = _upload(client, data, seed)
        run = client.create_run(
            name,
            model=model,
            dataset=dataset.id,
            model_version=model_version,
            seed=seed,
            search={"radius_sd": radius, "draws_per_source": draws, "max_sources": max_sources},
            vae={"epochs": vae_epochs},
            mixture={"min_support": min_support},
        )
        if wait:
            run = _wait(client, name)
    _print(run, as_json=as_json)
    _exit_unless_well(run)


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
        "failures": run.counts.failures,
        "regions": run.region_count,
        "note": run.error or run.note,
    }
    print_table((run.id, ""), list(facts.items()), caption="")


def _exit_unless_well(run: Run) -> None:
    if run.ended and run.state != "succeeded":
        raise typer.Exit(FAILED)
