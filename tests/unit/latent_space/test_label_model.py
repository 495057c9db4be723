import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.latent_space import label_model as subject

CENTRES = np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])


def planted(
    counts: tuple[int, int, int] = (300, 300, 300), seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Plant one round cloud a label in two live dimensions, and a third that is dead: mu 0, sigma 1."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)  # (n,)
    live = CENTRES[labels] + 0.5 * random.standard_normal((len(labels), 2))  # (n, 2)
    mu = np.column_stack([live, np.zeros(len(labels))]).astype(np.float32)  # (n, 3)
    sigma = np.tile(np.array([0.1, 0.1, 1.0], dtype=np.float32), (len(labels), 1))  # (n, 3)
    return mu, sigma, labels


def train(counts: tuple[int, int, int] = (300, 300, 300), n_classes: int = 3, seed: int = 0) -> subject.LabelModel:
    return subject.train_label_model(*planted(counts), n_classes, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def model() -> subject.LabelModel:
    return train()


def at(*points: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.array([[*np.asarray(point), 0.0] for point in points], dtype=np.float32)  # (n, 3)


def test_planted_labels_are_found(model: subject.LabelModel) -> None:
    """Unseen latents of each cloud get their label, and the held-out accuracy says so."""
    mu, _, labels = planted(seed=7)
    assert (subject.probability_of(model, mu, labels) > 0.5).mean() > 0.98
    assert model.held_out_accuracy > 0.98


def test_tensors_are_answered_where_they_are(model: subject.LabelModel) -> None:
    """Latents and labels as tensors get the same answer as arrays do, as a tensor; labels are integers of any type."""
    mu, _, labels = planted(seed=7)
    told = subject.probability_of(model, torch.from_numpy(mu), torch.from_numpy(labels))
    assert isinstance(told, torch.Tensor)
    np.testing.assert_array_equal(told, subject.probability_of(model, mu, labels.astype(np.int32)))


def test_a_step_across_the_boundary_loses_the_label(model: subject.LabelModel) -> None:
    """On the way from one cloud to another the source's label is sure, then in doubt, then gone."""
    start, middle, end = subject.probability_of(model, at((-2, 0), (0, 0), (2, 0)), np.zeros(3, dtype=np.int64))
    assert start > 0.98
    assert 0.01 < middle < 0.99
    assert end < 0.02


def test_dead_dimensions_do_not_drown_the_rest(model: subject.LabelModel) -> None:
    """A step in a dimension that carries nothing leaves the label where it was."""
    z = at((-2, 0)) + np.array([0, 0, 0.7], dtype=np.float32)
    assert subject.probability_of(model, z, np.zeros(1, dtype=np.int64))[0] > 0.95


def test_rare_and_absent_labels() -> None:
    """Ten images of a label suffice for clear latents; a label without images is never believed."""
    model = train(counts=(800, 10, 300), n_classes=4)
    assert subject.probability_of(model, at(CENTRES[1]), np.array([1]))[0] > 0.9
    assert (subject.probability_of(model, at(*CENTRES), np.full(3, 3)) < 0.01).all()


def test_same_seed_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is its data and its seed, and draws nothing from the global generator."""
    monkeypatch.setattr(subject, "_STEPS", 40)
    before = torch.get_rng_state()
    first, second, other = (subject.to_bytes(train(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first == second
    assert first != other


def test_bytes_round_trip(model: subject.LabelModel) -> None:
    """A file gives back logits bit for bit, with the held-out accuracy."""
    again = subject.from_bytes(subject.to_bytes(model))
    z = torch.tensor(at(*CENTRES))
    assert torch.equal(again(z), model(z))
    assert again.held_out_accuracy == model.held_out_accuracy


def test_other_files_are_refused() -> None:
    """Any file not of to_bytes is a ValueError."""
    with pytest.raises(ValueError, match="no label model"):
        subject.from_bytes(b"\x80\x04}.")


def test_labels_out_of_range_are_refused() -> None:
    """A label beyond the declared classes is named before training."""
    with pytest.raises(ValueError, match=r"labels are 0\.\.2"):
        train(n_classes=2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """One label a latent, or none is trained."""
    mu, sigma, labels = planted()
    with pytest.raises(ValueError, match="give"):
        subject.train_label_model(mu, sigma, labels[:-1], 3, seed=0, device="cpu")
