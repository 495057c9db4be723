"""Networks are trained once, and tuned without a change of the deployed one."""

from pathlib import Path

import numpy as np

from benchmarks.planted.networks import LabelledArrays, jittered, refit_head, train_afresh, tune
from tests.unit.benchmarks.planted.images import photographs


def test_a_network_is_trained_once_and_read_again(tmp_path: Path) -> None:
    data = photographs(20, 3)
    arrays = LabelledArrays(images=data.images["train"], labels=data.labels["train"])
    first = train_afresh(arrays, classes=3, seed=0, cache=tmp_path, epochs=1)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = train_afresh(arrays, classes=3, seed=0, cache=tmp_path, epochs=1)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    assert np.array_equal(first.penultimate(arrays.images), again.penultimate(arrays.images))
    other = train_afresh(arrays, classes=3, seed=1, cache=tmp_path, epochs=1)
    assert not np.array_equal(first.penultimate(arrays.images), other.penultimate(arrays.images))


def test_tuning_leaves_the_deployed_network_and_its_statistics(tmp_path: Path) -> None:
    data = photographs(20, 3)
    arrays = LabelledArrays(images=data.images["train"], labels=data.labels["train"])
    deployed = train_afresh(arrays, classes=3, seed=0, cache=tmp_path, epochs=1)
    before = {name: value.clone() for name, value in deployed.network.state_dict().items()}
    tuned = tune(deployed, arrays, epochs=1, seed=0, jitter=True, cache=tmp_path)
    refit = refit_head(deployed, arrays, seed=0, cache=tmp_path, epochs=1)
    assert all((value == before[name]).all() for name, value in deployed.network.state_dict().items())
    after = tuned.network.state_dict()
    assert (after["features.1.running_mean"] == before["features.1.running_mean"]).all()
    assert (after["features.0.weight"] != before["features.0.weight"]).any()
    assert (refit.network.state_dict()["features.0.weight"] == before["features.0.weight"]).all()
    assert (refit.network.state_dict()["head.0.weight"] != before["head.0.weight"]).any()


def test_jitter_stays_in_range_and_changes_colours() -> None:
    images = np.full((50, 3, 8, 8), 0.5, np.float32)
    changed = jittered(images, np.random.default_rng(0))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    means = changed.mean(axis=(2, 3))
    assert means.std(axis=0).min() > 0.05
    assert (means.max(axis=1) - means.min(axis=1)).max() > 0.05
