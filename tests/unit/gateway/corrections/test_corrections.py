import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from defuse.errors import AlreadyExists, Conflict, NotFound, NotReady
from defuse.v1 import annotation_pb2, correction_pb2, model_pb2, region_pb2, release_pb2, run_pb2, work_pb2

from services.gateway.corrections.corrections import Corrections, apply_event
from services.gateway.regions.regions import Regions
from services.gateway.runs.runs import Runs
from services.runtime.queue import CHOOSE, PREPARE, TRAIN, Queue
from services.runtime.worker import cancel_key
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.queues import close_queues

Correction, Training = correction_pb2.Correction, correction_pb2.Training
FIRST = "runs/first/corrections/c1"
ONE = correction_pb2.CorrectionConfig(methods=[Training.METHOD_CONTINUED], learning_rates=[1e-3])


def running(trainings: int = 2) -> correction_pb2.Correction:
    return Correction(
        name=FIRST,
        model="models/tiny",
        base_version=1,
        state=Correction.STATE_RUNNING,
        trainings=[
            Training(method=Training.METHOD_ALL_WEIGHTS, region_weight=0.1 * number) for number in range(trainings)
        ],
    )


def progress(share: float, note: str, training: int | None = None) -> work_pb2.Event:
    step = work_pb2.StageProgress(progress=share, note=note, training=training)
    return work_pb2.Event(subject=FIRST, progress=step)


def trained(position: int, share: float = 0.5) -> work_pb2.Event:
    done = Training(method=Training.METHOD_ALL_WEIGHTS, points=[correction_pb2.Point(share=share)])
    return work_pb2.Event(subject=FIRST, trained=work_pb2.Trained(position=position, training=done))


def corrected(name: str = FIRST) -> work_pb2.Event:
    result = correction_pb2.CorrectionResult(candidate="tiny-candidate", candidate_version=3)
    return work_pb2.Event(subject=name, corrected=work_pb2.Corrected(result=result))


def failed(name: str = FIRST) -> work_pb2.Event:
    return work_pb2.Event(subject=name, failed=work_pb2.StageFailed(error="the disk is gone"))


def test_progress_never_goes_back() -> None:
    """Progress that comes out of order does not turn the bar back; a note is shown."""
    correction = running()
    for event in (progress(0.5, "training", 1), progress(0.2, "late", 1), progress(0.0, "waiting: Triton")):
        assert list(apply_event(correction, event)) == []
    assert (correction.trainings[1].progress, correction.note) == (0.5, "waiting: Triton")
    assert correction.progress == pytest.approx(0.9 * 0.25)


def test_progress_is_that_of_all_trainings() -> None:
    """Trainings that run side by side count the same; the choice is the rest."""
    correction = running()
    for event in (progress(0.5, "", 0), progress(0.9, "", 1), trained(1)):
        apply_event(correction, event)
    assert correction.progress == pytest.approx(0.9 * 0.75)
    apply_event(correction, trained(0))
    apply_event(correction, progress(0.5, "measuring"))
    assert correction.progress == pytest.approx(0.95)


def test_a_training_that_failed_does_not_hold_up_the_choice() -> None:
    """It has ended, with the reason in the correction; the others go on, and what comes twice changes nothing."""
    correction = running()
    why = Training(method=Training.METHOD_ALL_WEIGHTS, error="it diverged")
    ended = work_pb2.Event(subject=FIRST, trained=work_pb2.Trained(position=0, training=why))
    assert list(apply_event(correction, ended)) == []
    assert correction.trainings[0].error == "it diverged"
    ((_, work),) = apply_event(correction, trained(1))
    assert work.correction.trainings[0].error == "it diverged"
    assert list(apply_event(correction, ended)) == []
    assert correction.state == Correction.STATE_RUNNING


def test_the_choice_begins_once_all_is_trained() -> None:
    """Only the last training to end starts the choice; a repeated event starts nothing."""
    correction = running()
    assert list(apply_event(correction, trained(1, 0.7))) == []
    assert list(apply_event(correction, trained(1, 0.2))) == []
    ((stream, work),) = apply_event(correction, trained(0, 0.3))
    assert stream == CHOOSE
    assert isinstance(work, work_pb2.ChooseWork)
    assert [training.points[0].share for training in work.correction.trainings] == [0.3, 0.7]
    assert list(apply_event(correction, trained(0))) == []


def test_the_end_of_a_correction() -> None:
    """The result is kept, and the correction is done."""
    correction = running()
    apply_event(correction, corrected())
    assert (correction.state, correction.progress) == (Correction.STATE_SUCCEEDED, 1.0)
    assert (correction.result.candidate, correction.result.candidate_version) == ("tiny-candidate", 3)


def test_a_correction_that_failed() -> None:
    """A failure ends the correction with its sentence."""
    correction = running()
    apply_event(correction, failed())
    assert (correction.state, correction.error) == (Correction.STATE_FAILED, "the disk is gone")


CANCELLED = work_pb2.Event(subject=FIRST, cancelled=work_pb2.Cancelled())


@pytest.mark.parametrize("end", [corrected(), failed(), CANCELLED])
def test_nothing_changes_a_correction_that_has_ended(end: work_pb2.Event) -> None:
    """Events that come twice or late change nothing."""
    correction = running()
    apply_event(correction, end)
    ended = Correction.FromString(correction.SerializeToString())
    for event in (end, progress(0.1, "late"), trained(0), trained(1), corrected(), failed(), CANCELLED):
        apply_event(correction, event)
        assert correction == ended


@pytest.fixture
def annotated(store: ArtifactStore) -> ArtifactStore:
    """Leave a model, and two runs of it that have one region with a label each."""
    store.write_message("models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"]))
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))
    for name in ("runs/first", "runs/second"):
        store.write_message(keys.run(name), run_pb2.Run(name=name, config={"model": "models/tiny"}))
        regions = [region_pb2.Region(name=f"{name}/regions/r1")]
        store.write_message(keys.distillation(name), region_pb2.Distillation(run=name, regions=regions))
        label = annotation_pb2.Annotation(region=f"{name}/regions/r1", verdict="VERDICT_LABEL", label="bee")
        store.write_message(f"{keys.annotations(f'{name}/regions/r1')}/1.pb", label)
    return store


def with_corrections(url: str, store: ArtifactStore, story: Callable[[Corrections, Queue], Awaitable[Any]]) -> None:
    """Tell a story to the corrections of two finished runs, over a real Redis."""

    async def tell() -> None:
        queue = Queue(url)
        runs = Runs(queue, store, None, None)  # type: ignore[arg-type]  # no run is created here: nobody is asked
        for name in ("runs/first", "runs/second"):
            run = run_pb2.Run(name=name, config={"model": "models/tiny"}, state=run_pb2.Run.STATE_SUCCEEDED)
            await runs.records.create(run, [(PREPARE, work_pb2.PrepareWork())])
        try:
            await story(Corrections(queue, Catalog(store), runs, Regions(store)), queue)
        finally:
            await close_queues(queue)

    asyncio.run(tell())


def test_one_correction_of_a_model_at_a_time(redis_url: str, annotated: ArtifactStore) -> None:
    """While one is under way a second of the same model is refused, also from another run; then it is numbered on."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        first = await corrections.create("runs/first", ONE)
        assert (first.name, first.base_version) == (FIRST, 1)
        for run in ("runs/first", "runs/second"):
            with pytest.raises(Conflict, match="runs/first/corrections/c1"):
                await corrections.create(run, correction_pb2.CorrectionConfig())
        assert await queue.redis.xlen(TRAIN) == 1
        await corrections.apply(corrected())
        second = await corrections.create("runs/first", correction_pb2.CorrectionConfig())
        assert second.name == "runs/first/corrections/c2"
        assert [one.name for one in await corrections.records.list("runs/first")] == [first.name, second.name]

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
        answers = await asyncio.gather(
            *(corrections.create("runs/first", ONE) for _ in range(4)), return_exceptions=True
        )
        assert sum(isinstance(answer, Correction) for answer in answers) == 1
        assert sum(isinstance(answer, Conflict | AlreadyExists) for answer in answers) == 3
        assert await queue.redis.xlen(TRAIN) == 1

    with_corrections(redis_url, annotated, story)


def test_each_training_is_a_message(redis_url: str, annotated: ArtifactStore) -> None:
    """Correctors that share a sweep get the correction with its labelled regions, and a position each."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        correction = await corrections.create(
            "runs/first",
            correction_pb2.CorrectionConfig(
                region_weights=[0.5, 0.3], learning_rates=[1e-3], methods=[Training.METHOD_ALL_WEIGHTS]
            ),
        )
        assert [(region.region, region.label) for region in correction.regions] == [("runs/first/regions/r1", "bee")]
        await queue.open([TRAIN])
        for position in range(2):
            delivery = await queue.receive([TRAIN])
            assert delivery
            work = work_pb2.TrainWork()
            delivery.decode(work)
            assert (work.correction, work.training) == (correction, position)
        assert [training.region_weight for training in correction.trainings] == [0.3, 0.5]

    with_corrections(redis_url, annotated, story)


@pytest.mark.parametrize("end", ["cancel", "failed"])
def test_what_is_left_of_an_ended_correction_is_stopped(redis_url: str, annotated: ArtifactStore, end: str) -> None:
    """Cancelled, or failed in one training, the others are told to stop, and the next correction may begin."""

    async def story(corrections: Corrections, queue: Queue) -> None:
        await corrections.create("runs/first", ONE)
        ended = await (corrections.cancel(FIRST) if end == "cancel" else corrections.apply(failed()))
        assert ended.state in {Correction.STATE_CANCELLED, Correction.STATE_FAILED}
        assert await queue.redis.exists(cancel_key(FIRST))
        assert (await corrections.cancel(FIRST)).state == ended.state
        await corrections.create("runs/second", ONE)

    with_corrections(redis_url, annotated, story)


def test_weights_that_were_not_uploaded(redis_url: str, annotated: ArtifactStore) -> None:
    """They are missed before any work begins."""

    async def story(corrections: Corrections, _: Queue) -> None:
        factory = {"function": "acme:net", "weights_digest": "abc"}
        with pytest.raises(NotFound, match="no file abc"):
            await corrections.create("runs/first", correction_pb2.CorrectionConfig(torch_factory=factory))

    with_corrections(redis_url, annotated, story)


def test_without_a_label_there_is_nothing_to_correct(redis_url: str, annotated: ArtifactStore) -> None:
    """A run whose regions have no label is refused with the command that gives one."""
    unsure = annotation_pb2.Annotation(region="runs/first/regions/r1", verdict="VERDICT_UNSURE")
    annotated.write_message(f"{keys.annotations('runs/first/regions/r1')}/2.pb", unsure)

    async def story(corrections: Corrections, _: Queue) -> None:
        with pytest.raises(NotReady, match="defuse annotate"):
            await corrections.create("runs/first", correction_pb2.CorrectionConfig())

    with_corrections(redis_url, annotated, story)
