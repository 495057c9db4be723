"""The search as its users meet it: before it starts, while it runs, and what it leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defuse import Client, InvalidInput, Preprocessing
from PIL import Image

from services.generator.perturbations import perturbations
from services.generator.pipeline import rounded
from services.generator.run_context import noise_model_of
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.storage import keys
from services.storage.catalog import Catalog
from services.triton.client import InferenceClient
from tests.conftest import Stack, eventually
from tests.planted import CLASSES, TRUE, WRONG, Planted
from tests.scenario.conftest import RUN_TIMEOUT_S, SEARCH, failures

RUN = "undisturbed"
EPOCHS = {"epochs": int(SEARCH[1])}


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client


@pytest.fixture
def subject(undisturbed: Any) -> dict[str, str]:
    """The settings of a second run on the same model and data."""
    return {"model": undisturbed["model"], "dataset": undisturbed["dataset"]}


@pytest.mark.usefixtures("undisturbed")
def test_every_failure_is_found_again_from_its_identity(local_stack: Stack) -> None:
    """Run, source, round and draw of a failure give the same latent, and the served classifier is wrong again."""
    reader, found = Catalog(local_stack.store), failures(local_stack, RUN)
    run = reader.run(f"runs/{RUN}")
    sources = local_stack.store.read_arrays(keys.sources(run.name))
    mu = np.concatenate(
        [local_stack.store.read_arrays(key)["mu"] for key in local_stack.store.keys(f"{run.name}/sources")]
    )
    classifier = InferenceClient(local_stack.state["addresses"]["triton"]).classifier(
        reader.model(run.config.model), version=run.config.model_version
    )
    for round_ in np.unique(found["round"]):
        rows = found["round"] == round_
        source = found["source"][rows]
        _, z = perturbations(
            noise_model_of(run),
            sources["sd_agg"],
            mu=mu[np.searchsorted(sources["index"], source)],
            source=source,
            round_=int(round_),
            draw=found["draw"][rows],
        )
        np.testing.assert_allclose(z, found["latent"][rows], atol=1e-6)
        images = RunImages(local_stack.store, run).render(Perturbations(latent=z.numpy(), source=source))
        logits = classifier.classify(rounded(images))
        assert np.array_equal(logits.argmax(axis=1), found["predicted_label"][rows])
    assert len(np.unique(found["round"])) > 1


def test_failures_as_they_are_found(client: Client, stack: Stack, subject: dict[str, str]) -> None:
    """The stream of a run that is under way gives every failure once; a resume token gives exactly the rest."""
    client.create_run(
        "streamed", **subject, search={"draws_per_source": 20, "shard_size": 200, "rendering": "decoder"}, vae=EPOCHS
    )
    batches = list(client.failures("streamed"))
    got = [(f.source, f.round, f.draw) for batch in batches for f in batch.failures]
    run = client.wait_for_run("streamed", timeout_s=RUN_TIMEOUT_S)
    assert len(got) == len(set(got)) == run.counts.failures > 0
    middle = len(batches) // 2
    rest = [
        f for batch in client.failures("streamed", resume_token=batches[middle].resume_token) for f in batch.failures
    ]
    assert [(f.source, f.round, f.draw) for f in rest] == [
        (f.source, f.round, f.draw) for batch in batches[middle + 1 :] for f in batch.failures
    ]
    with pytest.raises(InvalidInput, match="no resume token"):
        next(client.failures("streamed", resume_token="certainly not"))


def test_a_stream_that_is_closed_stops_the_search(client: Client, subject: dict[str, str]) -> None:
    """With `cancel_run`, who stops reading stops the work; the run says so."""
    client.create_run("abandoned", **subject, search={"draws_per_source": 2000, "rendering": "decoder"}, vae=EPOCHS)
    stream = client.failures("abandoned", cancel_run=True)
    next(stream)
    stream.close()
    eventually(lambda: client.run("abandoned").state == "cancelled")


def test_the_latent_space(client: Client, stack: Stack, undisturbed: Any, planted: Planted, workdir: Path) -> None:
    """Images are encoded and decoded to nearly themselves; the walk between two images begins and ends at them."""
    space = client.latent_space(RUN)
    images = planted.others[:20]
    mu, sigma = space.encode(images)
    assert mu.shape == sigma.shape
    assert (sigma > 0).all()
    decoded = space.decode(mu)
    assert np.abs(decoded.astype(float) - images).mean() < 20
    for name, picture in (("first.png", images[0]), ("last.png", images[1])):
        Image.fromarray(picture[..., 0]).save(workdir / name)
    shown = stack.defuse("runs", "interpolate", RUN, "first.png", "last.png", "--frames", "12")
    assert len(shown["predicted_labels"]) == 12
    with Image.open(workdir / shown["animation"]) as animation:
        assert animation.n_frames == 22
    walk = space.interpolate(images[0], images[1], frames=12)
    assert np.array_equal(walk.images[[0, -1]], space.decode(mu[:2]))
    with pytest.raises(InvalidInput, match="2 to 256 frames"):
        space.interpolate(images[0], images[1], frames=1)


def test_what_a_run_would_cost(client: Client, stack: Stack, subject: dict[str, str]) -> None:
    """The estimate counts what a run would decode, knows that the VAE is there, and stores no run."""
    cost = client.estimate_run(**subject, search={"draws_per_source": 30, "max_sources": 100}, vae=EPOCHS)
    assert (cost.sources, cost.decodes, cost.training_s) == (100, 3000, 0.0)
    assert cost.search_s == pytest.approx((cost.decodes + 2 * cost.sources) / cost.decodes_per_s)
    untrained = client.estimate_run(**subject, vae={"epochs": 7})
    assert untrained.training_s > 0
    assert {run.id for run in client.runs()} >= {RUN}


def test_preprocessing_that_is_not_that_of_the_training(
    client: Client, planted: Planted, subject: dict[str, str]
) -> None:
    """A model that misreads labelled images is no subject of a search: the run fails, with both figures."""
    client.add_model("negative", planted.onnx, CLASSES, Preprocessing(low=1000.0, high=1001.0))
    client.create_run("mismatch", model="negative", dataset=subject["dataset"], vae=EPOCHS)
    run = client.wait_for_run("mismatch", timeout_s=RUN_TIMEOUT_S)
    assert (run.state, run.error_reason) == ("failed", "PREPROCESSING_MISMATCH")
    assert "where 0.5 is declared" in run.error


def test_a_vae_that_loses_too_much(client: Client, subject: dict[str, str]) -> None:
    """Reconstructions that the model cannot read would be failures of the VAE: the run fails, with the figures."""
    client.create_run("coarse", **subject, search={"rendering": "decoder"}, vae={"epochs": 1, "latent_dim": 2})
    run = client.wait_for_run("coarse", timeout_s=RUN_TIMEOUT_S)
    assert (run.state, run.error_reason) == ("failed", "VAE_TOO_COARSE")
    assert "where 0.1 is allowed" in run.error


@pytest.mark.usefixtures("undisturbed")
def test_a_pair_of_ones_own_and_an_oracle(
    local_stack: Stack, planted: Planted, subject: dict[str, str], tmp_path: Path
) -> None:
    """A run with the user's own encoder and decoder trains nothing, finds the spot, and asks the oracle too."""
    config = Catalog(local_stack.store).run(f"runs/{RUN}").config
    for part in ("encoder", "decoder"):
        (tmp_path / f"{part}.onnx").write_bytes(local_stack.store.read_bytes(keys.vae(config, f"{part}.onnx")))
    with local_stack.client() as client:
        client.add_model("twin", planted.onnx, CLASSES, Preprocessing(mean=(planted.mean,), std=(planted.std,)))
        with pytest.raises(InvalidInput, match="agrees with itself"):
            client.create_run("itself", **subject, validity={"oracle": subject["model"]})
        client.create_run(
            "own-pair",
            **subject,
            search={"draws_per_source": 20},
            vae={"encoder": tmp_path / "encoder.onnx", "decoder": tmp_path / "decoder.onnx"},
            # A second model that makes the same mistakes leaves nothing.
            validity={"oracle": "twin"},
        )
        run = client.wait_for_run("own-pair", timeout_s=RUN_TIMEOUT_S)
        assert run.state == "succeeded", run.error
        assert run.counts.failures == 0
        assert run.counts.rejected_by_oracle > 0
        with pytest.raises(InvalidInput, match="together or not at all"):
            client.create_run("half", **subject, vae={"encoder": tmp_path / "encoder.onnx"})
        client.create_run(
            "swapped", **subject, vae={"encoder": tmp_path / "decoder.onnx", "decoder": tmp_path / "encoder.onnx"}
        )
        swapped = client.wait_for_run("swapped", timeout_s=RUN_TIMEOUT_S)
    assert (swapped.state, swapped.error_reason) == ("failed", "UNFIT_VAE")


def test_uniform_search_and_the_released_noise(client: Client, subject: dict[str, str]) -> None:
    """The method as published stays available: the same draws for each source, noise that is not centred."""
    search = {"draws_per_source": 10, "strategy": "uniform", "noise": "released", "max_failures_per_source": 10}
    search |= {"rendering": "decoder"}
    client.create_run("released", **subject, search=search, vae=EPOCHS)
    run = client.wait_for_run("released", timeout_s=RUN_TIMEOUT_S)
    assert run.state == "succeeded", run.error
    counts = run.counts
    searchable = counts.sources - counts.sources_wrong_on_image - counts.sources_wrong_on_reconstruction
    assert counts.decodes == 10 * searchable
    assert counts.screened_out == 0


@pytest.mark.usefixtures("undisturbed")
def test_the_planted_confusion_is_the_most_frequent(local_stack: Stack) -> None:
    """Most stored failures are of the planted spot; the others are natural mistakes of the classifier."""
    found = failures(local_stack, RUN)
    pairs = np.stack([found["true_label"], found["predicted_label"]], axis=1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    assert tuple(kinds[counts.argmax()]) == (TRUE, WRONG)
    assert counts.max() > 1.5 * np.sort(counts)[-2]
