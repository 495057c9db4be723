"""Arguments, options and output that the commands share."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from defuse.errors import DefuseError, InvalidInput
from defuse.report import to_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]
ModelArgument = Annotated[str, typer.Argument(metavar="NAME", help="Id of the model.")]
# Exit status for a run, a correction or a gate that does not succeed; refused commands exit with 1.
EXIT_FAILED = 2
TIME_FORMAT = "%Y-%m-%d %H:%M:%S UTC"
# Data goes to standard output, everything else to standard error, so that `--json` can be piped.
console, error_console = Console(), Console(stderr=True)


class ProgressBar(Protocol):
    """Updates the bar of a stage; `fraction` is in [0, 1]."""

    def __call__(self, stage: str, fraction: float, note: str) -> None: ...


def parse_words(text: str) -> list[str]:
    """Return the parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_numbers(option: str, text: str) -> list[float]:
    """Return the numbers in a comma-separated list.

    Raises InvalidInput, with the name of the option, for anything else.
    """
    try:
        return [float(part) for part in parse_words(text)]
    except ValueError as error:
        raise InvalidInput(f"{option} is {text!r}; give numbers separated by commas, for instance 0.1,0.3") from error


def to_record(value: Any) -> dict[str, Any]:
    """Return a value as a JSON object, with its state."""
    found: dict[str, Any] = to_json(value)
    return {**found, "state": value.state} if hasattr(value, "state") else found


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a record or a list of records as JSON."""
    sys.stdout.write(json.dumps(to_json(value), indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str) -> None:
    """Print a table; the caption states the order of the rows."""
    table = Table(caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def print_error(error: DefuseError) -> None:
    """Print an error in one line on standard error."""
    error_console.print(f"defuse: {error.message}", style="red", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[ProgressBar]:
    """Show progress bars on standard error, one line per stage."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=error_console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, fraction: float, note: str) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=1.0)
                tasks[stage] = bars.add_task(stage, total=1.0, note="")
            bars.update(tasks[stage], completed=fraction, note=note)

        yield update
