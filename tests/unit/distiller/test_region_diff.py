from typing import Any

import numpy as np
import pytest
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2, region_pb2, release_pb2, run_pb2

from services.distiller.region_diff import diff_regions
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from tests.unit.generator.onnx_pairs import decoder_file, encoder_file

DIM = 6
PLACES = {"r1": 0.3, "r2": 0.7}


def put_model(store: ArtifactStore, name: str, **fields: Any) -> None:
    declared = {"classes": ["a", "b"], "image_shape": [2, 3, 1]} | fields
    store.write_message(keys.model(name), model_pb2.Model(name=name, **declared))
    store.write_message(f"{keys.releases(name)}/1.pb", release_pb2.Release(model=name, version=1))


def put_run(store: ArtifactStore, name: str, regions: dict[str, float], *, scale: float, model: str) -> None:
    """Store a distilled run whose VAE tells pixels `scale` times smaller; regions lie at pixels of one gray."""
    config = run_pb2.RunConfig(model=model, dataset="datasets/d", vae={"epochs": int(10 * scale)})
    store.write_message(keys.run(name), run_pb2.Run(name=name, config=config))
    shrink = (np.eye(DIM) / scale).astype(np.float32)
    store.write_bytes(keys.vae(config, "encoder.onnx"), encoder_file(weight=shrink))
    store.write_bytes(keys.vae(config, "decoder.onnx"), decoder_file(scale=scale, clipped=False))
    random, records = np.random.default_rng(0), []
    for region, gray in regions.items():
        latent = (gray + 0.02 * random.standard_normal((60, DIM))) / scale
        arrays = {
            "mean": latent.mean(axis=0),
            "covariance": np.cov(latent.T),
            "latent": latent.astype(np.float32),
            "source": np.arange(60),
        }
        store.write_arrays(keys.region_arrays(f"{name}/regions/{region}"), arrays)
        records.append(region_pb2.Region(name=f"{name}/regions/{region}", true_label="a", predicted_label="b"))
    store.write_message(keys.distillation(name), region_pb2.Distillation(run=name, regions=records))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_regions_are_found_again_whatever_the_vae(store: ArtifactStore, scale: float) -> None:
    """With the first one's VAE or one that tells the same images by other numbers: kept, gone and new are told."""
    put_model(store, "models/one")
    put_run(store, "runs/first", PLACES, scale=1.0, model="models/one")
    put_run(store, "runs/second", {"r1": 0.7, "r2": 0.1}, scale=scale, model="models/one")
    diff = diff_regions(store, "runs/first", "runs/second")
    [pair] = diff.kept
    assert (pair.before.name, pair.after.name) == ("runs/first/regions/r2", "runs/second/regions/r1")
    assert not pair.moved
    assert [region.name for region in diff.gone] == ["runs/first/regions/r1"]
    assert [region.name for region in diff.added] == ["runs/second/regions/r2"]


def test_a_run_without_regions(store: ArtifactStore) -> None:
    """All regions of the other run are new."""
    put_model(store, "models/one")
    put_run(store, "runs/first", {}, scale=1.0, model="models/one")
    put_run(store, "runs/second", PLACES, scale=2.0, model="models/one")
    diff = diff_regions(store, "runs/first", "runs/second")
    assert (len(diff.added), len(diff.gone), len(diff.kept)) == (2, 0, 0)


@pytest.mark.parametrize("other", [{"classes": ["a", "c"]}, {"image_shape": [4, 4, 1]}])
def test_runs_of_other_classifiers_are_refused(store: ArtifactStore, other: dict[str, Any]) -> None:
    """The refusal tells both sides of what differs."""
    put_model(store, "models/one")
    put_model(store, "models/two", **other)
    put_run(store, "runs/first", PLACES, scale=1.0, model="models/one")
    put_run(store, "runs/second", PLACES, scale=1.0, model="models/two")
    with pytest.raises(InvalidInput, match="compare runs of one kind of classifier"):
        diff_regions(store, "runs/first", "runs/second")
