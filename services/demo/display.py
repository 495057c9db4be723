"""What the demo shows while it works."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from defuse import Estimate, Region
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


class Stage:
    """One line with a bar; call it with the share done and a note."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.moved = False

    def finish(self) -> None:
        self._progress.update(self._task, completed=1.0)

    def __call__(self, fraction: float, note: str = "") -> None:
        self._progress.update(self._task, completed=fraction, note=note[:60])
        self.moved = self.moved or fraction < 1.0


class Display:
    """A console with stages and tables."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Show one stage until the block ends."""
        with _bars(self._console) as progress:
            stage = Stage(progress, progress.add_task(title, total=1.0, note=""))
            yield stage
            stage.finish()

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, float, str], None]]:
        """Show the stages of a run, one line each as they come."""
        with _bars(self._console) as progress:
            tasks: dict[str, TaskID] = {}

            def show(title: str, fraction: float, note: str) -> None:
                if title not in tasks:
                    for task in tasks.values():
                        progress.update(task, completed=1.0)
                    tasks[title] = progress.add_task(title, total=1.0, note="")
                progress.update(tasks[title], completed=fraction, note=note[:60])

            yield show

    def regions(self, regions: Sequence[Region]) -> None:
        table = Table(title="misclassification regions, largest score first")
        for column in ("region", "true", "predicted", "score", "failures", "error rate of fresh decodes", "controls"):
            table.add_column(column)
        for region in regions:
            score, rate, control = (
                f"{region.score:.3f}",
                str(region.error_rate),
                f"{region.control_error_rate.value:.3f}",
            )
            table.add_row(region.id, region.true_label, region.predicted_label, score, str(region.size), rate, control)
        self._console.print(table)

    def figures(self, rows: Sequence[tuple[str, Estimate, Estimate]]) -> None:
        table = Table(title="accuracy through Triton, with 95 % intervals")
        for column in ("", "version before", "version after"):
            table.add_column(column)
        for title, before, after in rows:
            table.add_row(title, str(before), str(after))
        self._console.print(table)


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)
