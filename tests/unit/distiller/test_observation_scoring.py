"""The stage `watch` in a tiny world whose latents are the pixels themselves, and whose regions are corners of them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from defuse.v1 import correction_pb2, monitor_pb2, work_pb2
from scipy.stats import binom

from services.corrector.evaluation import LocalVersion
from services.corrector.guard.builder import GuardBuilder
from services.distiller.assessment import DistillerDependencies
from services.distiller.observation_scoring import ObservationScorer
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog
from tests.unit.corrector.corrections import CLASSES, DATASET, MODEL, REGIONS, ROWS, RUN
from tests.unit.corrector.guard.world import annotate, searched

Array = npt.NDArray[Any]
GUARD = f"{MODEL}/guards/1"
BATCH = f"{MODEL}/observations/2026-11-26-14/b1"


class LocalInference:
    """Runs versions here, as Triton would."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def classifier(self, model: Any, *, version: int) -> LocalVersion:
        return LocalVersion(self._store.read_bytes(keys.model_file(model.name, version)), model)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A guard of the first region, which is labelled."""
    store = ArtifactStore(f"file://{tmp_path}/store")
    searched(store)
    annotate(store, REGIONS[0], CLASSES[0])
    built = GuardBuilder(store, Catalog(store).run(RUN)).build(0.2)
    built.record.name = GUARD
    store.write_bytes(keys.onnx_file(GUARD), built.file)
    store.write_message(keys.guard(GUARD), built.record)
    return store


def pictures(store: ArtifactStore, region: int) -> Array:
    """Return the images (20, h, w, c) of the held-out failures of a region."""
    latent = store.read_arrays(keys.region_arrays(REGIONS[region]))["held_out_latent"]
    return np.rint(np.clip(latent, 0, 1) * 255).astype(np.uint8).reshape(-1, 2, 3, 1)


def report(store: ArtifactStore, images: Array, scores: Array, *, has_image: Array | None = None) -> None:
    count = len(images)
    has_image = np.ones(count, bool) if has_image is None else has_image
    arrays = {
        "image": images[has_image],
        "has_image": has_image,
        "scores": scores.astype(np.float32),
        "has_scores": np.ones(count, bool),
    }
    ids = [f"o{number}" for number in range(count)]
    arrays["id"] = np.frombuffer(b"".join(map(keys.observation_digest, ids)), np.uint8).reshape(count, 16)
    store.write_arrays(keys.observed_images(BATCH), arrays)
    record(store, ids)


def record(store: ArtifactStore, ids: list[str]) -> None:
    observations = [monitor_pb2.Observation(id=one) for one in ids]
    store.write_message(keys.batch_record(BATCH), monitor_pb2.ObservationBatch(observations=observations))


def watched(store: ArtifactStore, *, guard: str = GUARD, latents_alone: bool = False) -> dict[str, Array]:
    watcher = ObservationScorer(DistillerDependencies(store=store, inference=LocalInference(store)))  # type: ignore[arg-type]
    work = work_pb2.WatchWork(model=MODEL, batch=BATCH, guard=guard, latents_alone=latents_alone)
    event = watcher.watch(work, Job(MODEL, lambda _: None))
    assert (event.subject, event.watched.batch, event.watched.guard) == (MODEL, BATCH, guard)
    return store.read_arrays(keys.observation_scores(BATCH))


def test_images_are_looked_for_in_the_regions(store: ArtifactStore) -> None:
    """Pictures of the labelled region are inside of it, those of another are not; latents are what the encoder says."""
    images = np.concatenate([pictures(store, 0), pictures(store, 1)])
    scores = np.tile([0.0, 2.0, 1.0], (len(images), 1))
    report(store, images, scores)
    seen = watched(store)
    inside = seen["inside"] > 0
    assert inside[:20].mean() > 0.9
    assert not inside[20:].any()
    assert set(seen["index"][inside].tolist()) == {0}
    np.testing.assert_allclose(seen["latent"], images.reshape(40, -1) / 255, atol=1e-6)
    assert set(seen["predicted"].tolist()) == {1}
    np.testing.assert_allclose(seen["confidence"], np.exp(2) / (1 + np.exp(1) + np.exp(2)), rtol=1e-5)


def test_what_has_no_image_or_no_scores(store: ArtifactStore) -> None:
    """Nothing is made up for it, and the others are looked at."""
    images = pictures(store, 0)
    has_image = np.arange(len(images)) % 2 == 1
    report(store, images, np.zeros((len(images), 3)), has_image=has_image)
    seen = watched(store)
    assert (seen["index"][~has_image] == -1).all()
    assert np.isnan(seen["typicality"][~has_image]).all()
    assert (seen["inside"][has_image] > 0).mean() > 0.8
    assert seen["id"].shape == (20, 16)


def test_without_a_guard_only_scores_are_looked_at(store: ArtifactStore) -> None:
    images = pictures(store, 0)
    report(store, images, np.tile([3.0, 0.0, 0.0], (len(images), 1)))
    seen = watched(store, guard="")
    assert (seen["predicted"] == 0).all()
    assert (seen["index"] == -1).all()
    assert not store.exists(keys.guard_reference(GUARD))


def test_latents_alone_are_kept(store: ArtifactStore) -> None:
    """Images are gone, what was seen of them stays, also when the message comes again."""
    report(store, pictures(store, 0), np.zeros((20, 3)))
    first = watched(store, latents_alone=True)
    assert set(store.read_arrays(keys.observed_images(BATCH))) == {"id", "has_image", "scores", "has_scores"}
    again = watched(store, latents_alone=True)
    np.testing.assert_array_equal(first["latent"], again["latent"])


def test_observations_that_are_deleted_meanwhile(store: ArtifactStore) -> None:
    """A deletion changes the record first: scores that were written meanwhile are deleted, too."""
    report(store, pictures(store, 0), np.zeros((20, 3)))
    record(store, ["o3", "o7"])
    seen = watched(store, latents_alone=True)
    assert [row.tobytes() for row in seen["id"]] == [keys.observation_digest(one) for one in ("o3", "o7")]
    assert len(store.read_arrays(keys.observed_images(BATCH))["scores"]) == 2


def test_a_batch_that_was_deleted_meanwhile(store: ArtifactStore) -> None:
    watcher = ObservationScorer(DistillerDependencies(store=store, inference=LocalInference(store)))  # type: ignore[arg-type]
    event = watcher.watch(work_pb2.WatchWork(model=MODEL, batch=BATCH, guard=GUARD), Job(MODEL, lambda _: None))
    assert event.watched.batch == BATCH
    assert not store.exists(keys.observation_scores(BATCH))


def test_the_reference_profile(store: ArtifactStore) -> None:
    """Counts are those of the test split, bounds above them, and as many are sure as are right."""
    report(store, pictures(store, 0), np.zeros((20, 3)))
    watched(store)
    profile = store.read_arrays(keys.guard_reference(GUARD))
    model, test = Catalog(store).model(MODEL), Catalog(store).split(DATASET, "test", Catalog(store).model(MODEL))
    version = LocalInference(store).classifier(model, version=1)
    answers = version.classify_stored(test.images)
    assert int(profile["images"][0]) == ROWS["test"]
    assert int(profile["correct"][0]) == int((answers.argmax(axis=1) == test.labels).sum())
    np.testing.assert_array_equal(profile["predicted"], np.bincount(answers.argmax(axis=1), minlength=3))
    shares = np.exp(answers) / np.exp(answers).sum(axis=1, keepdims=True)
    assert int((shares.max(axis=1) > profile["confidence"][0]).sum()) == int(profile["correct"][0])
    guard = Catalog(store).guard(GUARD)
    assert [one.region for one in guard.regions] == [REGIONS[0]]
    assert profile["hits"].sum() <= guard.measured_false_alarm_rate.successes + guard.misread_recall.successes
    # At the bound so few hits would be a rare thing.
    assert binom.cdf(profile["hits"], ROWS["test"], profile["hits_bound"]) == pytest.approx([0.01])
    assert (np.diff(profile["typicality"]) >= 0).all()


def test_the_regions_of_a_guard_are_counted_from_zero(store: ArtifactStore) -> None:
    assert list(Catalog(store).guard(GUARD).regions) == [
        correction_pb2.LabelledRegion(region=REGIONS[0], label=CLASSES[0])
    ]
