"""The whole workflow of a user, through the public client."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from defuse import Client, Correction, Dataset, Estimate, Model, Preprocessing, Region, Release, Run
from defuse.report import write_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.demo import classifier
from services.demo.classifier import DemoData


class ProgressLine:
    """A progress bar with a title.

    A call takes the finished fraction and a note.
    """

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
    """A console that shows stages and tables."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[ProgressLine]:
        """Show one stage while the block runs."""
        with _bars(self._console) as progress:
            stage = ProgressLine(progress, progress.add_task(title, total=1.0, note=""))
            yield stage
            stage.finish()

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, float, str], None]]:
        """Show the stages of a run, one line each."""
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
        for column in ("region", "true", "predicted", "score", "failures", "error rate of fresh images", "controls"):
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


SEED = 0


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """The results that the demo prints."""

    run: Run
    correction: Correction | None
    release: Release | None
    report: Path


def run_main_job(
    client: Client, data: DemoData, *, name: str, cache: Path, report: Path, display: Display
) -> DemoOutcome:
    """Train and serve a classifier, search, correct, release and report."""
    model = serve_classifier(client, data, name=name, cache=cache, display=display)
    dataset = _upload(client, data, display)
    run = _search(client, model, dataset, name, display)
    correction, release = None, None
    if regions := _annotate(client, run, display):
        correction = _correct(client, run, regions, display)
        release = _release(client, run, correction, display)
    return DemoOutcome(run=run, correction=correction, release=release, report=write_report(client, run.id, report))


def serve_classifier(client: Client, data: DemoData, *, name: str, cache: Path, display: Display) -> Model:
    """Register the classifier, trained now or read from the cache."""
    train = data.splits["train"]
    file = cache / f"classifier-{_cache_key(data)}.onnx"
    with display.stage("training a classifier") as stage:
        if not file.exists():
            network = classifier.train(
                train.images,
                train.labels,
                classes=len(data.classes),
                seed=SEED,
                on_epoch=lambda epoch, epochs, loss: stage(epoch / epochs, f"epoch {epoch}, loss {loss:.3f}"),
            )
            partial = file.with_suffix(".partial")
            partial.write_bytes(classifier.to_onnx(network, train.images.shape[1:]))
            partial.replace(file)
        stage(1.0, "cached" if not stage.moved else "trained")
    mean, std = classifier.statistics(train.images)
    with display.stage("serving it from Triton"):
        return client.add_model(name, file, data.classes, Preprocessing(mean=mean, std=std))


def _cache_key(data: DemoData) -> str:
    """Return the cache key of the trained classifier.

    It depends on images, recipe and torch version.
    """
    recipe = Path(classifier.__file__).read_bytes()
    return hashlib.sha256(recipe + f"{data.digest}:{torch.__version__}".encode()).hexdigest()[:16]


def _upload(client: Client, data: DemoData, display: Display) -> Dataset:
    with display.stage("uploading the images") as stage:
        return client.add_dataset(
            data.path, seed=SEED, on_progress=lambda sent, total: stage(sent / total, f"{sent // 1024} KiB")
        )


def _search(client: Client, model: Model, dataset: Dataset, name: str, display: Display) -> Run:
    client.create_run(name, model=model.id, dataset=dataset.id, seed=SEED)
    with display.stages() as show:
        run = client.wait_for_run(name, on_change=lambda run: show(run.state, run.progress, run.note))
    if run.state != "succeeded":
        raise RuntimeError(f"run {run.id} {run.state}: {run.error}")
    display.say(run.note)
    return run


def _annotate(client: Client, run: Run, display: Display) -> list[Region]:
    """Accept the suggested label of every region.

    A note says that a person would inspect the images instead.
    """
    regions = client.regions(run.id)
    for region in regions:
        client.annotate(run.id, region.id, label=region.suggested_label, annotator="demo (suggestion accepted)")
    display.regions(regions)
    if regions:
        display.say("accepted the suggested label of every region (a person would look at each contact sheet)")
    return regions


def _correct(client: Client, run: Run, regions: list[Region], display: Display) -> Correction:
    # The learning rate that suits this small network; the default tries a wide range.
    started = client.create_correction(run.id, learning_rates=[1e-3], seed=SEED)
    with display.stage(f"correcting with {len(regions)} regions") as stage:
        correction = client.wait_for_correction(
            run.id, started.id, on_change=lambda state: stage(state.progress, state.note)
        )
    if correction.state != "succeeded":
        raise RuntimeError(f"correction {correction.id} failed: {correction.error}")
    return correction


def _release(client: Client, run: Run, correction: Correction, display: Display) -> Release | None:
    verdict = correction.verdict
    if verdict and not verdict.passed:
        failed = ", ".join(f"{check.kind} {check.subject}".strip() for check in verdict.failed)
        display.say(f"not released: the candidate does not pass the gate ({failed}); see the report")
        return None
    release = client.release(run.id, correction.id, reason="demo")
    display.say(f"passed the gate and released: callers of {release.model} get version {release.version} now")
    return release


def figures(correction: Correction) -> list[tuple[str, Estimate, Estimate]]:
    """Return the rows of the demo's table: figure, before, after."""
    return [
        ("test images", correction.test_before, correction.test_after),
        ("held-out region images", correction.regions_before, correction.regions_after),
    ]
