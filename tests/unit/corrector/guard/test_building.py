"""Guards of a run in a tiny world: latents are the pixels themselves, regions are corners of them."""

from pathlib import Path

import numpy as np
import pytest
from defuse.errors import InvalidInput, NotReady
from defuse.guard_outputs import INSIDE, OUTPUTS, REGION

from services.corrector.guard.builder import GuardBuilder, conformal_threshold
from services.onnx_graph.onnx_files import onnx_function
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.unit.corrector.corrections import CLASSES, MODEL, REGIONS, ROWS, RUN
from tests.unit.corrector.guard.world import annotate, searched


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(f"file://{tmp_path}/store")
    searched(store)
    return store


def builder(store: ArtifactStore) -> GuardBuilder:
    # The deployed network is random: what it reads correctly is about a third.
    return GuardBuilder(store, Catalog(store).run(RUN))


def test_a_guard_knows_the_labelled_regions(store: ArtifactStore) -> None:
    """Images of a planted corner are inside, by its name; those of one that nobody labelled are not."""
    annotate(store, REGIONS[0], CLASSES[0])
    annotate(store, REGIONS[1], "", "VERDICT_INVALID")
    built = builder(store).build(0.2)
    assert [(one.region, one.label) for one in built.record.regions] == [(REGIONS[0], CLASSES[0])]
    guard, latents = (
        onnx_function(built.file),
        [store.read_arrays(keys.region_arrays(region))["held_out_latent"] for region in REGIONS],
    )
    planted, other = (dict(zip(OUTPUTS, guard(latent.reshape(-1, 1, 2, 3)), strict=True)) for latent in latents)
    assert planted[INSIDE].mean() > 0.9
    assert set(planted[REGION][planted[INSIDE]]) == {REGIONS[0]}
    assert not other[INSIDE].any()
    assert built.record.recall.trials == len(latents[0])
    assert built.record.recall.value == pytest.approx(planted[INSIDE].mean())


def test_false_alarms_are_measured_on_images_that_decided_nothing(store: ArtifactStore) -> None:
    """The record counts the test split's correctly read images, and the others by themselves."""
    annotate(store, REGIONS[0], CLASSES[0])
    record = builder(store).build(0.2).record
    assert record.false_alarm_rate == 0.2
    assert 0 < record.calibration_images < ROWS["val"] / 2
    assert record.measured_false_alarm_rate.trials + record.misread_recall.trials == ROWS["test"]
    assert record.run == RUN


def test_without_a_label_there_is_no_guard(store: ArtifactStore) -> None:
    with pytest.raises(NotReady, match="annotate at least one") as caught:
        builder(store).build()
    assert caught.value.reason == "NO_ANNOTATIONS"


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_that_is_none(store: ArtifactStore, rate: float) -> None:
    with pytest.raises(InvalidInput, match="false alarm rate"):
        builder(store).build(rate)


def test_too_few_images(store: ArtifactStore) -> None:
    """A rate that so few images cannot tell is refused, with what could be told."""
    annotate(store, REGIONS[0], CLASSES[0])
    with pytest.raises(NotReady, match="needs 999 held-out images") as caught:
        builder(store).build(0.001)
    assert caught.value.reason == "TOO_FEW_IMAGES"


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_threshold_keeps_its_rate(rate: float) -> None:
    """Over many calibrations new images reach it as often as stated, and no oftener, also with few images."""
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        threshold = conformal_threshold(generator.standard_normal(60), rate)
        rates.append((generator.standard_normal(100) >= threshold).mean())
    assert rate - 0.017 - 0.003 < np.mean(rates) < rate + 0.003


def test_the_threshold_itself_is_no_alarm_of_calibration() -> None:
    """Of a hundred images five at most reach the threshold of a twentieth."""
    risk = np.arange(100.0)
    assert (risk >= conformal_threshold(risk, 0.05)).sum() == 4


def test_the_model_is_named(store: ArtifactStore) -> None:
    assert builder(store).model.name == MODEL
