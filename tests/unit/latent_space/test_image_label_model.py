from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.arrays import as_floats
from services.latent_space import image_label_model as subject

Array = npt.NDArray[Any]


def stripes(count: int, seed: int) -> tuple[Array, Array]:
    """Plant images (n, 16, 16, 3) whose label is the direction of their stripes; brightness and colour vary."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    phase, wave = random.integers(0, 4, count), np.array([0, 1, 1, 0])
    line = wave[(np.arange(16)[None] + phase[:, None]) % 4]  # (n, 16)
    pattern = np.where(labels[:, None, None] == 0, line[:, None, :], line[:, :, None])  # (n, 16, 16)
    colour = random.uniform(60, 180, (count, 1, 1, 3))
    noise = random.normal(0, 10, (count, 16, 16, 3))
    return np.clip(60 + pattern[..., None] * colour + noise, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained() -> subject.ImageLabelModel:
    return subject.train_image_label_model(*stripes(600, 0), 3, seed=1, device="cpu")


def test_labels_of_new_images(trained: subject.ImageLabelModel) -> None:
    """New images are read, also dark ones; a class without images gets nothing."""
    images, labels = stripes(200, 1)
    assert trained.held_out_accuracy > 0.95
    told = subject.image_probabilities(trained, as_floats(images // 2))
    assert (told.argmax(axis=1) == labels).mean() > 0.95
    assert told[:, 2].max() < 0.05
    np.testing.assert_allclose(
        subject.probability_of_label(trained, as_floats(images // 2), labels), told[np.arange(200), labels]
    )


def test_an_image_between_two_labels_has_neither(trained: subject.ImageLabelModel) -> None:
    """Where both patterns are equally strong, fewer images are sure of their label than of pure ones."""
    images, labels = stripes(400, 2)
    first, other = as_floats(images[labels == 0][:100]), as_floats(images[labels == 1][:100])
    mixed = subject.image_probabilities(trained, (first + other) / 2).max(axis=1)
    pure = subject.image_probabilities(trained, first).max(axis=1)
    assert (mixed > 0.97).mean() < (pure > 0.97).mean()


def test_a_file_holds_the_model(trained: subject.ImageLabelModel) -> None:
    again = subject.read_image_label_model(subject.image_label_model_bytes(trained))
    images = as_floats(stripes(20, 3)[0])
    np.testing.assert_array_equal(
        subject.image_probabilities(again, images), subject.image_probabilities(trained, images)
    )
    assert again.held_out_accuracy == trained.held_out_accuracy
    with pytest.raises(ValueError, match="no image label model"):
        subject.read_image_label_model(b"something else")


def test_same_seed_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights follow from data and seed, not from torch's global generator."""
    monkeypatch.setattr(subject, "_LEAST_STEPS", 3)
    monkeypatch.setattr(subject, "_MOST_STEPS", 3)
    images, labels = stripes(60, 4)
    models = []
    for seed in (5, 5, 6):
        torch.rand(3)
        models.append(subject.train_image_label_model(images, labels, 2, seed=seed, device="cpu"))
    first, again, other = (model.state_dict()["layers.0.0.weight"] for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_jitter_is_light() -> None:
    """Jittered images stay in [0, 1], differ from each other, and resemble their image."""
    images = torch.from_numpy(as_floats(stripes(50, 5)[0]))
    changed = subject.jitter(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed != images).any(dim=(1, 2, 3)).all()
    assert (changed - images).abs().mean() < 0.25


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, int), "give uint8"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int), "give uint8"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0]), "class ids from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(images: Array, labels: Array, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        subject.train_image_label_model(images, labels, 2, seed=0, device="cpu")
