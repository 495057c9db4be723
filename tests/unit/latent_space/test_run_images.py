from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from defuse.errors import NotFound
from defuse.v1 import dataset_pb2, model_pb2, release_pb2, run_pb2
from onnx import helper, numpy_helper

from services.arrays import as_floats
from services.latent_space.rendering import NO_SOURCE, Perturbations
from services.latent_space.run_images import RegionShape, RunImages, SourceFilter
from services.statistics.gaussian import Gaussian
from services.storage import keys
from services.storage.artifacts import ArtifactStore

Array = npt.NDArray[Any]
WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) / 8
SHARD = 30
# Searched images: two classes, of which every fifth image is read wrongly.
COUNT = 80
SD_AGG = np.array([1.0, 2.0, 0.5, 1.0], np.float32)
LEAST, MOST_RADIUS = 0.9, 0.5


def onnx_file(nodes: list[onnx.NodeProto], given: list[Any], answer: list[Any], *weights: tuple[str, Array]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, ["n", *given])],
        [helper.make_tensor_value_info("answer", onnx.TensorProto.FLOAT, ["n", *answer])],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def decoder_file() -> bytes:
    """Return latents (n, 4) times a matrix, as images (n, 1, 2, 3)."""
    nodes = [
        helper.make_node("MatMul", ["given", "weight"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["answer"]),
    ]
    return onnx_file(nodes, [4], [1, 2, 3], ("weight", WEIGHT), ("shape", np.array([-1, 1, 2, 3])))


def label_model_file() -> bytes:
    """Return a model that gives class 0 to images whose first pixel is dark, class 1 to others."""
    weight = np.zeros((6, 2), np.float32)
    weight[0] = [-200, 200]
    nodes = [
        helper.make_node("Flatten", ["given"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["answer"]),
    ]
    bias = np.array([100, -100], np.float32)
    return onnx_file(nodes, [1, 2, 3], [2], ("weight", weight), ("bias", bias))


def run_of(rendering: str) -> run_pb2.Run:
    config = run_pb2.RunConfig(
        model="models/m",
        dataset="datasets/d",
        search={"rendering": f"RENDERING_{rendering}", "shard_size": SHARD},
        validity={
            "label_model": "LABEL_MODEL_IMAGE",
            "min_label_probability": LEAST,
            "max_radius_sd": MOST_RADIUS,
        },
    )
    return run_pb2.Run(name="runs/r", config=config)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """Return what preparation and search leave of a run."""
    made: Path = tmp_path_factory.mktemp("store")
    store, random, config = ArtifactStore(f"file://{made}"), np.random.default_rng(1), run_of("RESIDUAL").config
    store.write_bytes(keys.vae(config, "decoder.onnx"), decoder_file())
    store.write_bytes(keys.label_model_onnx(config), label_model_file())
    model = model_pb2.Model(name="models/m", classes=["dark", "bright"], image_shape=[2, 3, 1])
    store.write_message(keys.model(model.name), model)
    store.write_message(f"{keys.releases(model.name)}/1.pb", release_pb2.Release(version=1))
    store.write_message(keys.dataset("datasets/d"), dataset_pb2.Dataset(name="datasets/d", label_count=2))
    labels = np.arange(100) % 2
    images = random.integers(0, 256, (100, 2, 3, 1)).astype(np.uint8)
    images[:, 0, 0, 0] = np.where(labels == 0, 25, 230)
    store.write_arrays(keys.split("datasets/d", keys.SEARCHED_SPLIT), {"x": images, "y": labels})
    index = np.arange(COUNT) + 15
    held_out = (np.arange(COUNT) % 4 == 0).astype(np.uint8)
    store.write_arrays(keys.sources("runs/r"), {"index": index, "sd_agg": SD_AGG, "held_out": held_out})
    mu = random.standard_normal((COUNT, 4)).astype(np.float32)
    margin = np.where(np.arange(COUNT) % 5 == 0, -1.0, 1.0)
    for shard in range(-(-COUNT // SHARD)):
        part = slice(shard * SHARD, (shard + 1) * SHARD)
        store.write_arrays(keys.shard_sources("runs/r", shard), {"mu": mu[part], "image_margin": margin[part]})
    return store


def region(store: ArtifactStore, rows: slice = slice(15, 60, 2)) -> RegionShape:
    """Return a region of the failures of some sources of one class, beside them in latent space."""
    source = np.arange(100)[rows]
    mean = RunImages(store, run_of("RESIDUAL")).sources.images.mu_of(source).mean(axis=0)
    return RegionShape(gaussian=Gaussian(mean=mean + 0.3, covariance=0.5 * np.eye(4)), sources=source)


def label_of(drawn: Perturbations) -> Array:
    return np.asarray(drawn.source % 2)


@pytest.mark.parametrize("count", [1, 600])
def test_the_decoder_of_a_run(store: ArtifactStore, count: int) -> None:
    """Latents of any precision and number become images in [0, 1], in order; outside values are clipped."""
    z = np.random.default_rng(1).standard_normal((count, 4))
    images = RunImages(store, run_of("DECODER")).render(Perturbations(latent=z, source=np.full(count, NO_SOURCE)))
    assert images.dtype == np.float32
    expected = np.clip((z @ WEIGHT).reshape(count, 1, 2, 3), 0, 1)
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_of_another_vae_is_not_taken(store: ArtifactStore) -> None:
    """A run whose VAE is not in the store gets no other run's."""
    run = run_of("DECODER")
    run.config.vae.epochs = 4
    with pytest.raises(NotFound, match=r"decoder\.onnx"):
        RunImages(store, run).decode(np.zeros((1, 4)))


def test_residual_images_are_changed_sources(store: ArtifactStore) -> None:
    """Latents and images of sources are found through all shards."""
    images = RunImages(store, run_of("RESIDUAL"))
    source = np.array([15, 94, 50, 15])
    mu, z = images.sources.images.mu_of(source), np.random.default_rng(2).standard_normal((4, 4)).astype(np.float32)
    split = store.read_arrays(keys.split("datasets/d", keys.SEARCHED_SPLIT))["x"]
    decoded, base = (np.clip((latent @ WEIGHT).reshape(4, 1, 2, 3), 0, 1) for latent in (z, mu))
    rendered = images.render(Perturbations(latent=z, source=source))
    np.testing.assert_allclose(rendered, np.clip(as_floats(split[source]) + decoded - base, 0, 1), atol=1e-5)


def test_fresh_images_come_from_sources_near_the_region(store: ArtifactStore) -> None:
    """They are of the class of its sources, read correctly, near it, no farther moved than allowed, and carry it."""
    images, shape = RunImages(store, run_of("RESIDUAL")), region(store)
    drawn = images.fresh(shape, label_of, 200, np.random.default_rng(0))
    known = images.sources
    at = np.searchsorted(known.images.row, drawn.source)
    assert len(drawn) > 150
    assert known.right[at].all()
    assert set(known.label[at]) == {1}
    distance = shape.gaussian.distance_squared(known.images.mu)
    own = distance[np.searchsorted(known.images.row, shape.sources)]
    assert distance[at].max() <= own.max()
    assert set(drawn.source) - set(shape.sources)  # other images beside its own
    radius = np.sqrt((((drawn.latent - known.images.mu[at]) / SD_AGG) ** 2).mean(axis=1))
    assert radius.max() == pytest.approx(MOST_RADIUS, abs=1e-5)
    assert images.carry(drawn, label_of(drawn)).all()


def test_fresh_images_of_different_sources(store: ArtifactStore) -> None:
    """As evidence, each source counts once, the nearest first."""
    images, shape = RunImages(store, run_of("RESIDUAL")), region(store)
    drawn = images.fresh(shape, label_of, 5, np.random.default_rng(0), one_of_each=True)
    assert len(drawn) == len(set(drawn.source)) == 5
    known = images.sources
    distance = shape.gaussian.distance_squared(known.images.mu)
    usable = known.right & (known.label == 1)
    nearest = known.images.row[np.flatnonzero(usable)[np.argsort(distance[usable])[:5]]]
    assert set(drawn.source) == set(nearest)


def test_fresh_images_of_some_sources(store: ArtifactStore) -> None:
    """Sources held out of correction can be left out, or taken alone."""
    images, shape = RunImages(store, run_of("RESIDUAL")), region(store)
    choices: list[SourceFilter] = [lambda sources: sources.held_out, lambda sources: ~sources.held_out]
    for wanted in choices:
        drawn = images.fresh(shape, label_of, 50, np.random.default_rng(0), of_source=wanted)
        assert len(drawn)
        assert wanted(images.sources)[np.searchsorted(images.sources.images.row, drawn.source)].all()
    nobody = images.fresh(shape, label_of, 50, np.random.default_rng(0), of_source=lambda _: np.zeros(COUNT, bool))
    assert not len(nobody)


def test_what_no_draw_carries_is_left_out(store: ArtifactStore) -> None:
    """Images without their label are drawn again, and left out at last."""
    images, shape = RunImages(store, run_of("RESIDUAL")), region(store)
    assert not len(images.fresh(shape, lambda drawn: 1 - label_of(drawn), 20, np.random.default_rng(0)))


def test_a_draw_of_the_decoder_has_no_source(store: ArtifactStore) -> None:
    """It has the region's mean and covariance, as far as it carries the label."""
    images, shape = RunImages(store, run_of("DECODER")), region(store)
    drawn = images.unchecked(shape, 4000, np.random.default_rng(0))
    assert (drawn.source == NO_SOURCE).all()
    np.testing.assert_allclose(drawn.latent.mean(axis=0), shape.gaussian.mean, atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.latent.T), shape.gaussian.covariance, atol=0.1)
