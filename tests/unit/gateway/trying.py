"""Trials of one model's corrections, as two gateways see them, over a real Redis and a real store."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from defuse.errors import NotReady
from defuse.v1 import correction_pb2, model_pb2, release_pb2, trial_pb2

from services.gateway.corrections.corrections import Corrections
from services.gateway.trials.trials import Trials
from services.runtime.queue import Queue
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.queues import close_queues

Correction, Trial = correction_pb2.Correction, trial_pb2.Trial
CORRECTION = "runs/first/corrections/c1"
TRIAL = "models/tiny/trials/t1"
# Where Triton serves the challenger.
CANDIDATE, CANDIDATE_VERSION = "tiny-candidate", 3
Story = Callable[[Trials, Trials], Awaitable[Any]]


def finished(name: str = CORRECTION, *, base_version: int = 1, passed: bool = True) -> correction_pb2.Correction:
    return Correction(
        name=name,
        model="models/tiny",
        base_version=base_version,
        state=Correction.STATE_SUCCEEDED,
        result={"candidate": CANDIDATE, "candidate_version": CANDIDATE_VERSION, "verdict": {"passed": passed}},
    )


def wanted(mode: "Trial.Mode.ValueType" = Trial.MODE_CANARY, *, share: float = 0.5, **fields: Any) -> trial_pb2.Trial:
    return Trial(mode=mode, **{"correction": CORRECTION, "share": share, "actor": "ann", **fields})


def with_trials(url: str, store: ArtifactStore, story: Story, *corrections: correction_pb2.Correction) -> Any:
    """Tell a story to the trials of two gateways, of a model at version 1 that has the corrections; return its end."""
    store.write_message("models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"]))
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))

    async def tell() -> Any:
        queues = [Queue(url), Queue(url)]
        catalog = Catalog(store)
        # Nothing is corrected here: runs and regions are not asked.
        books = [Corrections(queue, catalog, None, None) for queue in queues]  # type: ignore[arg-type]
        for correction in corrections or (finished(),):
            await books[0].records.create(correction, [])

        async def serve(trial: trial_pb2.Trial) -> tuple[str, int]:
            """Answer as the corrector, who asks the gate."""
            verdict = (await books[0].get(trial.correction)).result.verdict
            if trial.mode == Trial.MODE_CANARY and not verdict.passed and not (trial.approver and trial.reason):
                raise NotReady("it does not pass the gate", reason="GATE_NOT_PASSED")
            return CANDIDATE, CANDIDATE_VERSION

        one, other = (Trials(queue, catalog, records, serve) for queue, records in zip(queues, books, strict=True))
        try:
            return await asyncio.wait_for(story(one, other), 60)
        finally:
            await close_queues(*queues)

    return asyncio.run(tell())
