import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from defuse.errors import AlreadyExists, Conflict, InvalidInput, NotReady
from defuse.v1 import annotation_pb2, correction_pb2, model_pb2, region_pb2, release_pb2, run_pb2, work_pb2

from services.gateway.corrections import Corrections, complete, fold
from services.gateway.regions import Regions
from services.gateway.runs import Runs
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.catalog import Catalog
from services.runtime.queue import CORRECT, PREPARE, Queue

Correction = correction_pb2.Correction
FIRST = "runs/first/corrections/c1"


def running() -> correction_pb2.Correction:
    return Correction(name=FIRST, model="models/tiny", base_version=1, state=Correction.STATE_RUNNING)


def progress(share: float, note: str) -> work_pb2.Event:
    return work_pb2.Event(subject=FIRST, progress=work_pb2.StageProgress(progress=share, note=note))


def corrected(name: str = FIRST) -> work_pb2.Event:
    result = correction_pb2.CorrectionResult(candidate="tiny-candidate", candidate_version=3)
    return work_pb2.Event(subject=name, corrected=work_pb2.Corrected(result=result))


def failed(name: str = FIRST) -> work_pb2.Event:
    return work_pb2.Event(subject=name, failed=work_pb2.StageFailed(error="the disk is gone"))


def test_progress_never_goes_back() -> None:
    """Progress that comes out of order does not turn the bar back; a note is shown."""
    correction = running()
    for event in (progress(0.5, "training"), progress(0.2, "late"), progress(0.0, "waiting: Triton")):
        assert list(fold(correction, event)) == []
    assert (correction.progress, correction.note) == (0.5, "waiting: Triton")


def test_the_end_of_a_correction() -> None:
    """The result is kept, and the correction is done."""
    correction = running()
    fold(correction, corrected())
    assert (correction.state, correction.progress) == (Correction.STATE_SUCCEEDED, 1.0)
    assert (correction.result.candidate, correction.result.candidate_version) == ("tiny-candidate", 3)


def test_a_correction_that_failed() -> None:
    """A failure ends the correction with its sentence."""
    correction = running()
    fold(correction, failed())
    assert (correction.state, correction.error) == (Correction.STATE_FAILED, "the disk is gone")


@pytest.mark.parametrize("end", [corrected(), failed()])
def test_nothing_changes_a_correction_that_has_ended(end: work_pb2.Event) -> None:
    """Events that come twice or late change nothing."""
    correction = running()
    fold(correction, end)
    ended = Correction.FromString(correction.SerializeToString())
    for event in (end, progress(0.1, "late"), corrected(), failed()):
        fold(correction, event)
        assert correction == ended


def test_defaults() -> None:
    """What is 0 takes its default; lambda 0 is a value, and epochs 0 are left to the corrector."""
    whole = complete(correction_pb2.CorrectionConfig(seed=9))
    assert (whole.region_weight, whole.epochs, whole.learning_rate, whole.seed) == (0.0, 0, 2e-4, 9)
    given = correction_pb2.CorrectionConfig(region_weight=0.5, epochs=7, learning_rate=0.1, seed=1)
    assert complete(given) == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("region_weight", 1.0),
        ("region_weight", -0.1),
        ("region_weight", float("nan")),
        ("epochs", -1),
        ("learning_rate", 2.0),
        ("learning_rate", -1e-9),
        ("learning_rate", float("nan")),
    ],
)
def test_values_out_of_their_bounds_are_refused_by_name(name: str, value: float) -> None:
    """A value outside its bounds is refused with its name and itself; lambda is called lambda."""
    with pytest.raises(InvalidInput, match=f"{name.replace('region_weight', 'lambda')} (is )?{value}"):
        complete(correction_pb2.CorrectionConfig(**{name: value}))


@pytest.fixture
def annotated(store: ArtifactStore) -> ArtifactStore:
    """Leave a model, and two runs of it that have one region with a label each."""
    store.write_message("models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"]))
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))
    for name in ("runs/first", "runs/second"):
        store.write_message(catalog.run(name), run_pb2.Run(name=name, config={"model": "models/tiny"}))
        regions = [region_pb2.Region(name=f"{name}/regions/r1")]
        store.write_message(catalog.distillation(name), region_pb2.Distillation(run=name, regions=regions))
        label = annotation_pb2.Annotation(region=f"{name}/regions/r1", verdict="VERDICT_LABEL", label="bee")
        store.write_message(f"{catalog.annotations(f'{name}/regions/r1')}/1.pb", label)
    return store


def with_corrections(url: str, store: ArtifactStore, story: Callable[[Corrections, Queue], Awaitable[Any]]) -> None:
    """Tell a story to the corrections of two finished runs, over a real Redis."""

    async def tell() -> None:
        queue = Queue(url)
        runs = Runs(queue, store, None)  # type: ignore[arg-type]  # no run is created here, so Triton is not asked
        for name in ("runs/first", "runs/second"):
            run = run_pb2.Run(name=name, config={"model": "models/tiny"}, state=run_pb2.Run.STATE_SUCCEEDED)
            await runs.book.create(run, (PREPARE, work_pb2.PrepareWork()))
        try:
            await story(Corrections(queue, Catalog(store), runs, Regions(store)), queue)
        finally:
            await queue.close()

    asyncio.run(tell())


def test_one_correction_of_a_model_at_a_time(redis_url: str, annotated: ArtifactStore) -> None:
    """While one is under way a second of the same model is refused, also from another run; then it is numbered on."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        first = await corrections.create("runs/first", correction_pb2.CorrectionConfig())
        assert (first.name, first.base_version) == (FIRST, 1)
        for run in ("runs/first", "runs/second"):
            with pytest.raises(Conflict, match="runs/first/corrections/c1"):
                await corrections.create(run, correction_pb2.CorrectionConfig())
        assert await queue.redis.xlen(CORRECT) == 1
        await corrections.apply(corrected())
        second = await corrections.create("runs/first", correction_pb2.CorrectionConfig())
        assert second.name == "runs/first/corrections/c2"
        assert [one.name for one in await corrections.list("runs/first")] == [first.name, second.name]

    with_corrections(redis_url, annotated, story)


def test_an_end_that_comes_twice_frees_nobody_else(redis_url: str, annotated: ArtifactStore) -> None:
    """The second delivery of a correction's end does not let a third begin while the second is under way."""

    async def story(corrections: Corrections, _: Queue) -> None:
        await corrections.create("runs/first", correction_pb2.CorrectionConfig())
        await corrections.apply(corrected())
        await corrections.create("runs/second", correction_pb2.CorrectionConfig())
        await corrections.apply(corrected())
        with pytest.raises(Conflict, match="runs/second/corrections/c1"):
            await corrections.create("runs/first", correction_pb2.CorrectionConfig())

    with_corrections(redis_url, annotated, story)


def test_two_at_the_same_time(redis_url: str, annotated: ArtifactStore) -> None:
    """Of two corrections asked for at once one begins, and the other is told to wait or that the name is taken."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        config = correction_pb2.CorrectionConfig()
        answers = await asyncio.gather(
            *(corrections.create("runs/first", config) for _ in range(4)), return_exceptions=True
        )
        assert sum(isinstance(answer, Correction) for answer in answers) == 1
        assert sum(isinstance(answer, Conflict | AlreadyExists) for answer in answers) == 3
        assert await queue.redis.xlen(CORRECT) == 1

    with_corrections(redis_url, annotated, story)


def test_the_work_carries_what_the_corrector_needs(redis_url: str, annotated: ArtifactStore) -> None:
    """The message names run, correction and the labelled regions."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        correction = await corrections.create("runs/first", correction_pb2.CorrectionConfig(region_weight=0.3))
        await queue.open([CORRECT])
        delivery = await queue.receive([CORRECT])
        assert delivery
        work = work_pb2.CorrectWork()
        delivery.decode(work)
        assert work.correction == correction
        assert work.run.config.model == "models/tiny"
        assert [(region.region, region.label) for region in work.regions] == [("runs/first/regions/r1", "bee")]

    with_corrections(redis_url, annotated, story)


def test_without_a_label_there_is_nothing_to_correct(redis_url: str, annotated: ArtifactStore) -> None:
    """A run whose regions have no label is refused with the command that gives one."""
    unsure = annotation_pb2.Annotation(region="runs/first/regions/r1", verdict="VERDICT_UNSURE")
    annotated.write_message(f"{catalog.annotations('runs/first/regions/r1')}/2.pb", unsure)

    async def story(corrections: Corrections, _: Queue) -> None:
        with pytest.raises(NotReady, match="defuse annotate"):
            await corrections.create("runs/first", correction_pb2.CorrectionConfig())

    with_corrections(redis_url, annotated, story)
