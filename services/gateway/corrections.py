"""Corrections: one of a model at a time, their state a fold over the corrector's events."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from defuse import names
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import correction_pb2, run_pb2, work_pb2

from services.gateway.book import Book, Work
from services.gateway.regions import Regions
from services.gateway.runs import Runs, check_distilled
from services.runtime.catalog import Catalog
from services.runtime.queue import CORRECT, KEY, Queue

ENDED = (correction_pb2.Correction.STATE_SUCCEEDED, correction_pb2.Correction.STATE_FAILED)
_DEFAULT_LEARNING_RATE = 2e-4


class Corrections:
    """Starts, finds and watches corrections."""

    def __init__(self, queue: Queue, catalog: Catalog, runs: Runs, regions: Regions) -> None:
        self._catalog = catalog
        self._runs = runs
        self._regions = regions
        self.book: Book[correction_pb2.Correction] = Book(
            queue, correction_pb2.Correction, "corrections", lambda correction: correction.state in ENDED
        )

    async def create(self, run_name: str, config: correction_pb2.CorrectionConfig) -> correction_pb2.Correction:
        """Start a correction of the version that callers get now, with the regions that have a label."""
        run = await self._runs.get(run_name)
        check_distilled(run)
        labelled = await asyncio.to_thread(self._regions.labelled, run)
        if not labelled:
            raise NotReady(
                f"no region of run {names.last(run.name)!r} has a label; annotate at least one with `defuse annotate`",
                reason="NO_ANNOTATIONS",
            )
        correction = await self._new(run, complete(config))
        work = work_pb2.CorrectWork(
            run=run_pb2.Run(name=run.name, config=run.config, create_time=run.create_time),
            correction=correction,
            regions=labelled,
        )
        return await self.book.create(correction, (CORRECT, work), taking=_model_key(correction))

    async def get(self, name: str) -> correction_pb2.Correction:
        return await self.book.get(names.check(name, "runs/*/corrections/*"))

    async def list(self, run_name: str) -> list[correction_pb2.Correction]:
        """Return the corrections of a run, oldest first."""
        await self._runs.get(run_name)
        return await self.book.list(run_name)

    def watch(self, name: str) -> AsyncIterator[correction_pb2.Correction]:
        return self.book.watch(names.check(name, "runs/*/corrections/*"))

    async def apply(self, event: work_pb2.Event) -> correction_pb2.Correction:
        """Fold an event into the state of its correction."""
        correction = await self.get(event.subject)
        ends = event.WhichOneof("kind") in {"corrected", "failed"}
        return await self.book.apply(
            event.subject, lambda record: fold(record, event), releasing=_model_key(correction) if ends else None
        )

    async def _new(self, run: run_pb2.Run, config: correction_pb2.CorrectionConfig) -> correction_pb2.Correction:
        number = len(await self.book.list(run.name)) + 1
        model = await asyncio.to_thread(self._catalog.model, run.config.model)
        correction = correction_pb2.Correction(
            name=names.correction(names.last(run.name), f"c{number}"),
            config=config,
            model=model.name,
            base_version=model.champion_version,
            state=correction_pb2.Correction.STATE_RUNNING,
            note="waiting for the corrector",
        )
        correction.create_time.GetCurrentTime()
        return correction


def fold(correction: correction_pb2.Correction, event: work_pb2.Event) -> Sequence[Work]:
    """Change a correction by an event, in place. An event that comes twice changes nothing."""
    if correction.state in ENDED:
        return []
    kind = event.WhichOneof("kind")
    if kind == "progress":
        correction.progress = max(correction.progress, event.progress.progress)
        correction.note = event.progress.note
    elif kind == "corrected":
        correction.state = correction_pb2.Correction.STATE_SUCCEEDED
        correction.progress, correction.note = 1.0, ""
        correction.result.CopyFrom(event.corrected.result)
    elif kind == "failed":
        correction.state = correction_pb2.Correction.STATE_FAILED
        correction.error = event.failed.error
    return []


def complete(config: correction_pb2.CorrectionConfig) -> correction_pb2.CorrectionConfig:
    """Return a configuration with its defaults filled in; raise InvalidInput that names a value out of its bounds."""
    if not 0 <= config.region_weight < 1:
        raise InvalidInput(
            f"lambda is {config.region_weight}; it must be at least 0 and below 1", reason="OUT_OF_BOUNDS"
        )
    if config.epochs < 0 or not 0 <= config.learning_rate <= 1:
        raise InvalidInput(
            f"epochs is {config.epochs} and learning_rate {config.learning_rate}; epochs must be at least 1, the "
            "learning rate above 0 and at most 1",
            reason="OUT_OF_BOUNDS",
        )
    return correction_pb2.CorrectionConfig(
        region_weight=config.region_weight,
        epochs=config.epochs,
        learning_rate=config.learning_rate or _DEFAULT_LEARNING_RATE,
        seed=config.seed,
    )


def _model_key(correction: correction_pb2.Correction) -> str:
    """Return the key that the one correction under way of a model holds."""
    return f"{KEY}correcting:{correction.model}"
