"""What commands print: tables for people, JSON for scripts."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from defuse.errors import DefuseError
from defuse.report import to_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
# Data goes to standard output, everything else to standard error, so that `--json` can be piped.
console, errors = Console(), Console(stderr=True)


class Show(Protocol):
    """Moves a bar."""

    def __call__(self, stage: str, fraction: float, note: str) -> None: ...


def record(value: Any) -> dict[str, Any]:
    """Return a value of the client as a record; a region says its state."""
    found = asdict(value)
    return {**found, "state": value.state} if hasattr(value, "state") else found


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a record or a list of records."""
    sys.stdout.write(json.dumps(to_json(value), indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str) -> None:
    """Print rows under their columns; the caption says how they are sorted."""
    table = Table(caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def complain(error: DefuseError) -> None:
    """Print an error as one sentence."""
    errors.print(f"defuse: {error.message}", style="red", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Show]:
    """Show the stages of long work on standard error, one line each."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=errors) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, fraction: float, note: str) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=1.0)
                tasks[stage] = bars.add_task(stage, total=1.0, note="")
            bars.update(tasks[stage], completed=fraction, note=note)

        yield show
