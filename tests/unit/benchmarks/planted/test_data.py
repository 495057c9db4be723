"""Splits keep groups together."""

from pathlib import Path

import numpy as np

from benchmarks.planted.data import read_data, split_groups


def test_no_group_is_in_two_parts() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(90, size=2000)
    labels = groups % 7
    parts = split_groups(labels, groups, {"val": 0.2, "test": 0.2})
    held = {part: set(groups[rows].tolist()) for part, rows in parts.items()}
    assert not held["train"] & held["val"]
    assert not held["train"] & held["test"]
    assert not held["val"] & held["test"]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(2000))
    for rows in parts.values():
        assert set(labels[rows].tolist()) == set(range(7))


def test_tracks_of_an_npz_stay_together_and_copies_are_left_out(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    tracks = np.tile(np.repeat(np.arange(6), 10), 4)  # a track's number counts within its class
    images = random.integers(256, size=(240, 8, 8, 3)).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = tracks, labels
    test = np.concatenate([images[:5], random.integers(256, size=(20, 8, 8, 3)).astype(np.uint8)])
    file = tmp_path / "signs.npz"
    np.savez(file, x_train=images, y_train=labels, x_test=test, y_test=labels[:25], track_train=tracks)
    data = read_data(str(file)).data
    held = [{(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in data.images[split]} for split in ("train", "val")]
    assert not held[0] & held[1]
    assert len(held[0]) + len(held[1]) == 24
    assert len(data.labels["test"]) == 20


def test_gray_images_get_a_channel_and_missing_tests_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "gray.npz"
    labels = np.repeat(np.arange(3), 50)
    np.savez(file, x_train=np.zeros((150, 8, 8), np.uint8), y_train=labels, class_names=["a", "b", "c"])
    named = read_data(str(file), limit=20)
    assert named.data.image_shape == (8, 8, 1)
    assert named.classes == ("a", "b", "c")
    assert {split: len(found) for split, found in named.data.labels.items()} == {"train": 20, "val": 20, "test": 20}
