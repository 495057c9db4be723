"""Thresholds that annotations advise, as a new run takes them: a real Redis, and a generator that was told them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from defuse.errors import AlreadyExists, InvalidInput, NotFound, NotReady
from defuse.v1 import (
    annotation_pb2,
    dataset_pb2,
    generator_service_pb2,
    model_pb2,
    region_pb2,
    release_pb2,
    run_pb2,
    work_pb2,
)

from services.gateway.regions.regions import Regions
from services.gateway.runs.config import ThresholdAdvisor, complete
from services.gateway.runs.runs import Runs
from services.runtime.queue import PREPARE, Queue
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.queues import close_queues

Story = Callable[[Runs, "Generator"], Awaitable[Any]]
CONFIG = run_pb2.RunConfig(model="models/tiny", dataset="datasets/d", validity_from="runs/first")
REGIONS = "runs/first/regions"
ADVISED = run_pb2.ValidityConfig(
    max_radius_sd=0.9,
    min_typicality=0.02,
    min_label_probability=0.999,
    min_neighbour_agreement=0.85,
    max_round_trip_sd=0.5,
)


class Generator:
    """Advises what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[generator_service_pb2.LearnValidityRequest] = []

    async def call(self, method: Callable[..., Any]) -> Any:
        return await method(self, timeout=1.0)

    async def LearnValidity(  # noqa: N802  # gRPC's name
        self, request: generator_service_pb2.LearnValidityRequest, **_: float
    ) -> generator_service_pb2.LearnValidityResponse:
        self.asked.append(request)
        advice = run_pb2.ValidityAdvice(validity=ADVISED, invalid_rejected=0.9, valid_rejected=0.05)
        return generator_service_pb2.LearnValidityResponse(advice=advice)


class Triton:
    """Answers every image with the same logits."""

    def check(self) -> None:
        pass

    def classifier(self, model: model_pb2.Model, *, version: int) -> "Triton":
        return self

    def classify(self, images: Any) -> Any:
        return np.zeros((len(images), 2))


@pytest.fixture
def judged(store: ArtifactStore) -> ArtifactStore:
    """Leave a model, a data set and a run with a region that is labelled, one that is invalid and one that is open."""
    store.write_message(
        "models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"], image_shape=[2, 2, 1])
    )
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))
    data = dataset_pb2.Dataset(name="datasets/d", classes=["ant", "bee"], image_shape=[2, 2, 1], label_count=2)
    store.write_message(keys.dataset(data.name), data)
    regions = [region_pb2.Region(name=f"{REGIONS}/r{rank}", true_label="ant") for rank in (1, 2, 3)]
    store.write_message(keys.run("runs/first"), run_pb2.Run(name="runs/first", config={"model": "models/tiny"}))
    store.write_message(keys.distillation("runs/first"), region_pb2.Distillation(regions=regions))
    say(store, "r1", "LABEL", label="ant")
    say(store, "r2", "INVALID")
    return store


def say(store: ArtifactStore, region: str, verdict: str, label: str = "") -> None:
    value = annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict}")
    Regions(store).annotate(annotation_pb2.Annotation(region=f"{REGIONS}/{region}", verdict=value, label=label))


def tell(
    url: str,
    store: ArtifactStore,
    story: Story,
    *,
    state: "run_pb2.Run.State.ValueType" = run_pb2.Run.STATE_SUCCEEDED,
    **given: Any,
) -> None:
    """Tell a story to the runs of a gateway that has the judged run, in some state."""

    async def told() -> None:
        queue, generator = Queue(url), Generator()
        advice = ThresholdAdvisor(Regions(store), generator)  # type: ignore[arg-type]
        runs = Runs(queue, store, Triton(), advice)  # type: ignore[arg-type]
        search = {"rendering": "RENDERING_DECODER", **given}
        first = run_pb2.Run(name="runs/first", config=complete(run_pb2.RunConfig(search=search)), state=state)
        await runs.records.create(first, [(PREPARE, work_pb2.PrepareWork())])
        try:
            await story(runs, generator)
        finally:
            await close_queues(queue)

    asyncio.run(told())


def config(**sections: Any) -> run_pb2.RunConfig:
    whole = run_pb2.RunConfig(**sections)
    whole.MergeFrom(CONFIG)
    return whole


def test_a_run_takes_what_it_is_advised(redis_url: str, judged: ArtifactStore) -> None:
    """Every threshold that was left out is the advised one; it is learned from the regions that were judged.

    Rendering and label model are those that the thresholds are about.
    """

    async def story(runs: Runs, generator: Generator) -> None:
        run = await runs.create("second", config())
        assert run.config.search.rendering == run_pb2.SearchConfig.RENDERING_DECODER
        assert run.config.validity.label_model == run_pb2.ValidityConfig.LABEL_MODEL_LATENT
        run.config.validity.ClearField("label_model")
        assert run.config.validity == ADVISED
        run.config.validity.label_model = run_pb2.ValidityConfig.LABEL_MODEL_LATENT
        assert run.config.validity_from == "runs/first"
        assert (await runs.get("runs/second")).config == run.config
        [asked] = generator.asked
        assert (asked.run, list(asked.valid_regions), list(asked.invalid_regions)) == (
            "runs/first",
            [f"{REGIONS}/r1"],
            [f"{REGIONS}/r2"],
        )

    tell(redis_url, judged, story)


def test_another_rendering_keeps_its_own_thresholds(redis_url: str, judged: ArtifactStore) -> None:
    """Thresholds of one rendering say nothing about the other; the radius is in the same units."""

    async def story(runs: Runs, _: Generator) -> None:
        wanted = config(search={"rendering": "RENDERING_RESIDUAL"})
        validity = (await runs.create("residual", wanted)).config.validity
        assert validity.label_model == run_pb2.ValidityConfig.LABEL_MODEL_IMAGE
        assert (validity.max_radius_sd, validity.min_label_probability, validity.min_typicality) == (0.9, 0.97, 0)

    tell(redis_url, judged, story)


def test_what_is_said_by_hand_wins(redis_url: str, judged: ArtifactStore) -> None:
    """A threshold that the creator sets stays, also where it is looser; the others are the advised ones."""

    async def story(runs: Runs, _: Generator) -> None:
        by_hand = {"min_label_probability": 0.5, "min_typicality": 0.0}
        validity = (await runs.checked(config(validity=by_hand))).validity
        assert (validity.min_label_probability, validity.min_typicality) == (0.5, 0.0)
        assert (validity.min_neighbour_agreement, validity.max_round_trip_sd) == (0.85, 0.5)

    tell(redis_url, judged, story)


def test_without_a_run_to_learn_from_nobody_is_asked(redis_url: str, judged: ArtifactStore) -> None:
    """A run that names none has the defaults."""

    async def story(runs: Runs, generator: Generator) -> None:
        plain = await runs.checked(run_pb2.RunConfig(model="models/tiny", dataset="datasets/d"))
        assert plain.validity == complete(run_pb2.RunConfig()).validity
        assert generator.asked == []

    tell(redis_url, judged, story)


def test_a_run_stays_its_configuration(redis_url: str, judged: ArtifactStore) -> None:
    """Later annotations change nothing; the same request with another advice is another run."""

    async def story(runs: Runs, _: Generator) -> None:
        before = (await runs.create("second", config())).config
        say(judged, "r3", "INVALID")
        assert (await runs.get("runs/second")).config == before
        with pytest.raises(AlreadyExists):
            await runs.create("second", config(validity={"min_typicality": 0.3}))

    tell(redis_url, judged, story)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ({}, {}, 0.9),
        ({"noise": run_pb2.SearchConfig.NOISE_RELEASED}, {}, 1e9),
        ({}, {"noise": run_pb2.SearchConfig.NOISE_RELEASED}, 1.0),
        (
            {"noise": run_pb2.SearchConfig.NOISE_RELEASED},
            {"noise": run_pb2.SearchConfig.NOISE_RELEASED},
            0.9,
        ),
    ],
)
def test_the_radius_of_another_noise_model(
    redis_url: str, judged: ArtifactStore, here: dict[str, Any], there: dict[str, Any], expected: float
) -> None:
    """Steps of another law have other sizes: the advised radius is taken where the laws are the same."""

    async def story(runs: Runs, _: Generator) -> None:
        validity = (await runs.checked(config(search=here))).validity
        assert (validity.max_radius_sd, validity.min_typicality) == (expected, 0.02)

    tell(redis_url, judged, story, **there)


@pytest.mark.parametrize(("region", "verdict", "missing"), [("r2", "UNSURE", "invalid"), ("r1", "MIXED", "labelled")])
def test_nothing_to_learn(redis_url: str, judged: ArtifactStore, region: str, verdict: str, missing: str) -> None:
    """Without a region that is invalid, or one that is labelled, there is no advice, and the generator is not asked."""
    say(judged, region, verdict)

    async def story(runs: Runs, generator: Generator) -> None:
        with pytest.raises(NotReady, match=rf"no region of run 'first' is {missing}.*annotate at least one") as caught:
            await runs.create("second", config())
        assert caught.value.reason == "NOTHING_TO_LEARN"
        assert generator.asked == []
        with pytest.raises(NotFound):
            await runs.get("runs/second")

    tell(redis_url, judged, story)


def test_a_run_that_is_under_way_advises_nothing(redis_url: str, judged: ArtifactStore) -> None:
    """Its regions are not there yet, which is said so."""

    async def story(runs: Runs, _: Generator) -> None:
        with pytest.raises(NotReady, match="'first' is distilling"):
            await runs.checked(config())

    tell(redis_url, judged, story, state=run_pb2.Run.STATE_DISTILLING)


def test_a_run_that_is_not_there(redis_url: str, judged: ArtifactStore) -> None:
    """An unknown run, and what is no name of one, are refused."""

    async def story(runs: Runs, _: Generator) -> None:
        wanted = config()
        for name, error, words in (("runs/none", NotFound, "no run 'none'"), ("first", InvalidInput, "'first' is not")):
            wanted.validity_from = name
            with pytest.raises(error, match=words):
                await runs.checked(wanted)

    tell(redis_url, judged, story)
