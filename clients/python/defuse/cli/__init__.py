"""The command `defuse`, which is the client on the command line."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from defuse.cli import corrections, models, monitoring, regions, releases, runs
from defuse.cli.output import print_error
from defuse.errors import DefuseError
from defuse.version import VERSION

app = typer.Typer(
    name="defuse",
    help="Find, name, correct and monitor the systematic failures of a deployed image classifier.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.add_typer(regions.app, name="regions")
app.add_typer(corrections.app, name="corrections")
app.add_typer(releases.trials_app, name="trials")
app.add_typer(models.guards_app, name="guards")
app.add_typer(monitoring.monitor_app, name="monitor")
app.add_typer(monitoring.alerts_app, name="alerts")
app.command()(regions.annotate)
app.command()(corrections.correct)
app.command()(releases.gate)
app.command()(releases.verdict)
app.command()(releases.release)
app.command()(releases.rollback)
app.command()(releases.releases)
app.command()(runs.report)
app.command()(monitoring.audit)


def main() -> None:
    """Run the command line.

    An error is printed in one line, and the exit status is then 1.
    """
    try:
        app()
    except DefuseError as error:
        print_error(error)
        sys.exit(1)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up() -> None:
    """Start Redis, Triton and the services on this machine; ctrl-C stops them."""
    _replace_process("services", [])


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Argument(help="Class folders or an .npz; by default 5,000 MNIST digits.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("demo-report"),
) -> None:
    """Run the whole workflow once, on real images and real servers."""
    _replace_process("services.demo", [*([str(data)] if data else []), "--report", str(report)])


def _replace_process(module: str, arguments: list[str]) -> NoReturn:
    """Run a module of the services in place of this process."""
    if find_spec("services") is None:
        typer.echo(
            "defuse: this command needs the services, which are not installed here; install them from a checkout "
            "(pip install -e '.[stack,demo]') or use `docker compose up`",
            err=True,
        )
        raise typer.Exit(1)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606  # the same program, other module
