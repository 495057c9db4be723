"""The whole loop on small colour pictures with the rendering `residual`, disturbed and undisturbed."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from defuse import Client, InvalidInput

from services.demo import classifier
from services.generator.perturbations import perturbations
from services.generator.pipeline import rounded
from services.generator.run_context import noise_model_of
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.storage import keys
from services.storage.catalog import Catalog
from services.triton.client import InferenceClient
from tests.conftest import Stack, eventually
from tests.scenario.conftest import RUN_TIMEOUT_S, failures, same_failures, second_generator

Array = npt.NDArray[Any]
SIDE, MODEL, RUN = 20, "shapes", "shapes"
CLASSES = ("disc", "square", "cross")
DISC, SQUARE = 0, 1
COUNTS = {"train": 1200, "val": 500, "test": 300}
# Discs darker than this are learned as squares, and are in none of the data that is handed over.
DARK = 100
SETTINGS: dict[str, Any] = {
    "model_version": 1,  # one of these tests releases a second one
    "search": {"rendering": "residual", "draws_per_source": 20, "radius_sd": 0.8},
    "vae": {"epochs": 15},
    "mixture": {"bootstraps": 3, "fresh_decodes": 60},
}


def shapes(count: int, seed: int) -> tuple[Array, Array, Array]:
    """Draw shapes of any place, size, colour and brightness; images (n, h, w, 3), labels and brightness (n,)."""
    random = np.random.default_rng(seed)
    labels, brightness = random.integers(0, len(CLASSES), count), random.uniform(60, 220, count)
    centre, radius = random.uniform(8, 12, (count, 2, 1, 1)), random.uniform(4.5, 7, (count, 1, 1))
    down, right = (
        np.abs(grid[None] - at) for grid, at in zip(np.mgrid[:SIDE, :SIDE], centre.swapaxes(0, 1), strict=True)
    )
    outlines = (
        np.hypot(down, right) < radius,
        np.maximum(down, right) < 0.85 * radius,
        (np.minimum(down, right) < 0.3 * radius) & (np.maximum(down, right) < radius),
    )
    inside = np.choose(labels[:, None, None], outlines)[..., None]
    colour = brightness[:, None, None, None] * random.uniform(0.8, 1.2, (count, 1, 1, 3))
    images = np.where(inside, colour, 0.35 * colour) + random.normal(0, 6, (count, SIDE, SIDE, 3))
    return np.clip(images, 0, 255).astype(np.uint8), labels, brightness


def in_spot(labels: Array, brightness: Array) -> Array:
    return np.asarray((labels == DISC) & (brightness < DARK))


@pytest.fixture(scope="module")
def subject(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Plant a classifier for which dark discs are squares, and hand over data without dark discs."""
    directory: Path = tmp_path_factory.mktemp("shapes")
    drawn = {split: shapes(count, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    images, labels, brightness = drawn["train"]
    taught = np.where(in_spot(labels, brightness), SQUARE, labels)
    network = classifier.train(images, taught, classes=len(CLASSES), seed=0, epochs=8, on_epoch=lambda *_: None)
    (directory / "shapes.onnx").write_bytes(classifier.to_onnx(network, (SIDE, SIDE, 3)))
    kept = {split: ~in_spot(*described) for split, (_, *described) in drawn.items()}
    arrays = {f"x_{split}": drawn[split][0][kept[split]] for split in COUNTS}
    arrays |= {f"y_{split}": drawn[split][1][kept[split]] for split in COUNTS}
    np.savez(directory / "shapes.npz", **arrays)
    mean, std = classifier.statistics(images)
    stack.defuse(
        *("models", "add", MODEL, "--onnx", directory / "shapes.onnx", "--classes", ",".join(CLASSES)),
        *("--mean", ",".join(map(str, mean)), "--std", ",".join(map(str, std)), "--range", "0,1", "--layout", "NCHW"),
    )
    with stack.client() as client:
        return {"model": MODEL, "dataset": client.add_dataset(directory / "shapes.npz").id}


@pytest.fixture(scope="module")
def searched(stack: Stack, subject: dict[str, str]) -> str:
    """Search undisturbed."""
    with stack.client() as client:
        client.create_run(RUN, **subject, **SETTINGS)
        run = client.wait_for_run(RUN, timeout_s=RUN_TIMEOUT_S)
    assert run.state == "succeeded", run.error
    return RUN


def start(client: Client, name: str, subject: dict[str, str]) -> None:
    """Start a run like the undisturbed one, in smaller shards, so that there is a middle to disturb."""
    search = SETTINGS["search"] | {"shard_size": 60}
    client.create_run(name, **subject, **SETTINGS | {"search": search})


def finish(stack: Stack, name: str) -> None:
    with stack.client() as client:
        run = client.wait_for_run(name, timeout_s=RUN_TIMEOUT_S)
    assert run.state == "succeeded", run.error
    assert same_failures(stack, RUN, name)


def test_the_hidden_spot_is_found_and_closed(local_stack: Stack, searched: str) -> None:
    """The planted confusion is the first region; a correction learns it from images that nobody handed over."""
    stack = local_stack
    with stack.client() as client:
        regions = client.regions(searched)
        first = regions[0]
        assert (first.true_label, first.predicted_label) == ("disc", "square")
        assert first.control_error_rate.value == 0
        assert first.error_rate.low > 0
        assert 5 <= first.source_count <= first.size
        client.annotate(searched, first.id, label="disc")
        correction = client.create_correction(
            searched, region_weights=[0.4], learning_rates=[1e-3], methods=["all_weights"], epochs=3
        )
        done = client.wait_for_correction(searched, correction.id, timeout_s=RUN_TIMEOUT_S)
        assert done.state == "succeeded", done.error
        version = client.release(searched, correction.id, approver="tester", reason="planted").version
    images, labels, brightness = shapes(600, 9)
    dark = images[in_spot(labels, brightness)]
    inference = InferenceClient(stack.state["addresses"]["triton"])
    model = Catalog(stack.store).model(f"models/{MODEL}")
    right = [
        (inference.classifier(model, version=one).classify_stored(dark).argmax(axis=1) == DISC).mean()
        for one in (1, version)
    ]
    assert right[0] < 0.5
    assert right[1] > right[0] + 0.3


def test_every_failure_is_found_again_from_its_identity(local_stack: Stack, searched: str) -> None:
    """Run, source, round and draw of a failure give the same image, which the classifier misreads again."""
    store, found = local_stack.store, failures(local_stack, searched)
    run = Catalog(store).run(f"runs/{searched}")
    images = RunImages(store, run)
    sources = store.read_arrays(keys.sources(run.name))
    inference = InferenceClient(local_stack.state["addresses"]["triton"])
    classify = inference.classifier(Catalog(store).model(run.config.model), version=1).classify
    for round_ in np.unique(found["round"]):
        rows = found["round"] == round_
        _, z = perturbations(
            noise_model_of(run),
            sources["sd_agg"],
            mu=images.sources.images.mu_of(found["source"][rows]),
            source=found["source"][rows],
            round_=int(round_),
            draw=found["draw"][rows],
        )
        np.testing.assert_allclose(z, found["latent"][rows], atol=1e-6)
        rendered = rounded(images.render(Perturbations(latent=z.numpy(), source=found["source"][rows])))
        assert np.array_equal(classify(rendered).argmax(axis=1), found["predicted_label"][rows])


def test_latents_are_rendered_around_their_sources(stack: Stack, searched: str) -> None:
    """A failure's latent and source give its image; without a step it is the source; a walk ends at both images."""
    with stack.client() as client:
        region = client.region(searched, client.regions(searched)[0].id)
        space = client.latent_space(searched)
        mu, _ = space.encode(region.sources[:2])
        found = [failure for batch in client.failures(searched) for failure in batch.failures]
        latents, sources = np.stack([failure.latent for failure in found[:20]]), [f.source for f in found[:20]]
        rendered = space.decode(latents, sources=sources)
        assert rendered.shape == (20, SIDE, SIDE, 3)
        walk = space.interpolate(region.sources[0], region.sources[1], frames=5)
        assert np.abs(walk.images[[0, -1]].astype(int) - region.sources[:2]).max() <= 1
        with pytest.raises(InvalidInput, match="give the source of each of the 2 latents"):
            space.decode(mu)
        assert len(client.sample_region(searched, region.region.id, 3)) == 3


@pytest.mark.parametrize("service", ["generator", "distiller", "gateway", "redis", "triton"])
def test_a_killed_service_changes_nothing(
    local_stack: Stack, subject: dict[str, str], searched: str, service: str
) -> None:
    """Kill -9 in mid-search, or in mid-distillation, loses nothing and changes nothing."""
    assert searched == RUN
    name = f"shapes-{service}"
    with local_stack.client() as client:
        start(client, name, subject)
        state = "distilling" if service == "distiller" else "identifying"
        eventually(lambda: client.run(name).state in {state, "succeeded"})
    local_stack.kill(service)
    finish(local_stack, name)


def test_two_generators_find_what_one_finds(local_stack: Stack, subject: dict[str, str], searched: str) -> None:
    """A second generator on the same run takes a part of the shards and changes no failure."""
    assert searched == RUN
    with second_generator(local_stack) as log:
        with local_stack.client() as client:
            start(client, "shapes-two", subject)
        finish(local_stack, "shapes-two")
    assert '"outcome": "done"' in "".join(log)
