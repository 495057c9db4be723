from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from services.generator.codec import SD_FLOOR, aggregate_sd
from services.generator.failures import Failures
from services.generator.perturbations import screening_by
from services.generator.validity import (
    NEIGHBOURS,
    Reference,
    Thresholds,
    ValidityCheck,
    latent_checks,
    radius_sd,
)

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
CENTRES = np.array([[-2.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
THRESHOLDS = Thresholds(
    max_radius_sd=1.0,
    min_typicality=0.1,
    min_label_probability=0.9,
    min_neighbour_agreement=0.8,
    max_round_trip_sd=1.0,
)


def clouds(count: int = 2000, seed: int = 0, sd: float = 0.5) -> tuple[Array, Array]:
    """Plant two round clouds, of labels 3 and 7, as latents (n, 3) with labels (n,)."""
    label = np.arange(count) % 2
    mu = CENTRES[label] + sd * np.random.default_rng(seed).standard_normal((count, 3))
    return mu.astype(np.float32), np.array([3, 7])[label]


def reference_of(mu: Array, label: Array, sigma: float = 0.0) -> Reference:
    return Reference.of(mu, np.full_like(mu, sigma), label, aggregate_sd(mu), row=np.arange(len(mu)))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return reference_of(*clouds())


def test_typicality_is_uniform_on_what_is_like_the_references(reference: Reference) -> None:
    """The share of references that are less typical is uniform over unseen latents of their kind."""
    typicality = reference.typicality(clouds(seed=1)[0])
    assert stats.kstest(typicality, "uniform").statistic < 0.05


def test_typicality_is_that_of_the_planted_density(reference: Reference) -> None:
    """Latents are ordered by their density under the planted clouds, and between the clouds there is nothing."""
    z, _ = clouds(500, seed=2)
    density = np.logaddexp(*(-(((z - centre) / 0.5) ** 2).sum(axis=1) / 2 for centre in CENTRES))
    assert stats.spearmanr(reference.typicality(z), density).statistic > 0.99
    far = np.array([[0.0, 0.0, 1.0], [-2.0, 3.0, 1.0], [9.0, 9.0, 9.0]], np.float32)
    assert reference.typicality(far).max() < 0.01
    assert reference.typicality(CENTRES).min() > 0.9


def test_typicality_knows_how_classes_differ() -> None:
    """A rare class, and one that is spread out, are less dense, and so less typical, than a frequent and narrow one."""
    random = np.random.default_rng(9)
    centre, sd, share = np.array([[-4.0, 0.0], [0.0, 0.0], [4.0, 0.0]]), np.array([0.3, 0.3, 1.2]), [0.6, 0.1, 0.3]

    def drawn(count: int) -> tuple[Array, Array]:
        label = random.choice(3, count, p=share)
        return centre[label] + sd[label, None] * random.standard_normal((count, 2)), label

    z, _ = drawn(1000)
    parts = [np.log(s / w**2) - (((z - c) / w) ** 2).sum(axis=1) / 2 for c, w, s in zip(centre, sd, share, strict=True)]
    described = reference_of(*drawn(4000))
    assert stats.spearmanr(described.typicality(z), np.logaddexp.reduce(parts)).statistic > 0.99


def test_typicality_knows_how_wide_posteriors_are() -> None:
    """A step along a dimension in which posteriors are wide is less unusual than one where they are points."""
    mu, label = clouds()
    wide = Reference.of(mu, np.full_like(mu, 1.0) * [0, 0, 1], label, aggregate_sd(mu), row=np.arange(len(mu)))
    along, across = CENTRES[0] + np.array([[0.0, 0.0, 1.2], [0.0, 1.2, 0.0]])
    typicality = reference_of(mu, label).typicality(np.array([along, across]))
    assert typicality[0] == pytest.approx(typicality[1], abs=0.03)
    assert wide.typicality(along[None]) > wide.typicality(across[None]) + 0.3


def test_neighbours_carry_the_label_of_their_cloud(reference: Reference) -> None:
    """Deep in a cloud all neighbours agree with its label and none with the other; in no man's land some do."""
    z, label = clouds(700, seed=3)
    agreement = reference.neighbour_agreement(z, label, CPU)
    assert agreement.shape == (700,)
    assert (agreement == 1).mean() > 0.99
    assert reference.neighbour_agreement(z, 10 - label, CPU).max() < 0.5
    assert (reference.neighbour_agreement(z, np.full(700, 5), CPU) == 0).all()


def test_ten_neighbours_are_asked() -> None:
    """Agreement is a share of the ten nearest, as the contract says."""
    line = np.arange(1.0, 21.0)[:, None]
    agreement = reference_of(line, (line[:, 0] > 7).astype(int)).neighbour_agreement(np.zeros((1, 1)), np.zeros(1), CPU)
    assert agreement == pytest.approx([0.7])


def test_neighbours_are_the_nearest_in_latent_deviations() -> None:
    """Agreement is the share among the nearest references, distances in units of each dimension's deviation."""
    random = np.random.default_rng(4)
    mu, label = random.standard_normal((300, 4)) * [1, 10, 0.1, 3], random.integers(0, 3, 300)
    z, asked = random.standard_normal((40, 4)) * [1, 10, 0.1, 3], random.integers(0, 3, 40)
    sd = aggregate_sd(mu)
    distance = (((z[:, None] - mu[None]) / sd) ** 2).sum(axis=2)  # (40, 300)
    nearest = np.argsort(distance, axis=1)[:, :NEIGHBOURS]
    expected = (label[nearest] == asked[:, None]).mean(axis=1)
    assert 0 < expected.mean() < 1
    np.testing.assert_allclose(reference_of(mu, label).neighbour_agreement(z, asked, CPU), expected)


def test_fewer_references_than_neighbours() -> None:
    """Where there are fewer training images than neighbours, all of them are asked."""
    few = reference_of(np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]]), np.array([0, 0, 1]))
    assert few.neighbour_agreement(np.zeros((1, 2)), np.array([0]), CPU) == pytest.approx([2 / 3])


def test_a_class_with_one_image() -> None:
    """A class of one image leans on the spread of all: near it is typical, far from everything is not."""
    mu, label = clouds(400)
    alone = np.array([[0.0, 8.0, 1.0]], np.float32)
    described = reference_of(np.concatenate([mu, alone]), np.append(label, 9))
    assert described.typicality(alone)[0] > 0
    assert np.isfinite(described.whitening).all()
    near, far = described.typicality(alone + np.array([[0.1, 0.1, 0.1], [0.0, 9.0, 0.0]], np.float32))
    assert near > far
    assert described.typicality(clouds(400, seed=1)[0]).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sigma", [0.0, 1.0], ids=["a point", "a posterior"])
def test_a_dead_dimension_makes_no_difference(sigma: float) -> None:
    """A step along a dimension in which all images are the same leaves typicality and neighbours as they are."""
    mu, label = clouds()
    dead = np.column_stack([mu, np.full(len(mu), 9.0, np.float32)])
    width = np.zeros_like(dead)
    width[:, 3] = sigma
    described, plain = (
        Reference.of(dead, width, label, aggregate_sd(dead), row=np.arange(len(dead))),
        reference_of(mu, label),
    )
    z, asked = clouds(300, seed=5)
    steps = np.random.default_rng(6).standard_normal(300) * 0.5 * SD_FLOOR
    moved = np.column_stack([z, 9.0 + steps]).astype(np.float32)
    np.testing.assert_allclose(described.typicality(moved), plain.typicality(z), atol=0.01)
    expected = plain.neighbour_agreement(z, asked, CPU)
    np.testing.assert_allclose(described.neighbour_agreement(moved, asked, CPU), expected, atol=0.11)


def test_fewer_images_than_dimensions() -> None:
    """Latents of more dimensions than there are images, or of some that repeat others, still have a density."""
    random = np.random.default_rng(7)
    few, label = random.standard_normal((12, 30)), np.arange(12) % 2
    repeated = np.tile(random.standard_normal((100, 2)), 2)
    for mu, labels in ((few, label), (repeated, np.arange(100) % 2)):
        described = reference_of(mu, labels)
        assert np.isfinite(described.log_density).all()
        assert described.typicality(mu).mean() == pytest.approx(0.5, abs=0.1)
        assert described.typicality(mu + 100.0).max() == 0


def test_a_reference_survives_the_store(reference: Reference) -> None:
    """A reference is its arrays: made of them again, it says the same."""
    z, _ = clouds(50, seed=8)
    again = Reference(**reference.arrays())
    np.testing.assert_array_equal(again.typicality(z), reference.typicality(z))


def test_radius_is_the_length_of_a_step_in_deviations() -> None:
    """The radius is norm((z - mu) / sd_agg) / sqrt(d), and a dimension without scale adds nothing."""
    z, mu = np.array([[4.0, 5.0, 6.0]]), np.array([[1.0, 1.0, 6.0]])
    assert radius_sd(z, mu, np.array([1.0, 1.0, 1.0])) == pytest.approx([5 / np.sqrt(3)])
    assert radius_sd(z, mu, np.array([3.0, 4.0, 0.0])) == pytest.approx([np.sqrt(2 / 3)])
    tensors = (torch.from_numpy(array) for array in (z, mu, np.array([3.0, 4.0, 0.0])))
    assert radius_sd(*tensors).numpy() == pytest.approx([np.sqrt(2 / 3)])


def candidates(z: Array, label: Array, radius: Array) -> Failures:
    return Failures.of(source=np.arange(len(z)), latent=z, true_label=label, radius_sd=radius)


def passed(check: ValidityCheck, found: Failures) -> list[bool]:
    passes: list[bool] = np.asarray(check.passes(check.measure(found))).tolist()
    return passes


def probability(z: Array, label: Array) -> Array:
    """Believe label 3 left of x0 = 0 and label 7 right of it."""
    return np.where((z[:, 0] > 0) == (label == 7), 0.9, 0.1)


def test_each_check_of_latents_asks_its_question(reference: Reference) -> None:
    """Each check records its own field, and passes from its threshold on: both ends belong to what passes."""
    found = candidates(
        np.array([[-2.0, 0.0, 1.0], [-2.0, 0.0, 1.0], [-2.0, 0.0, 1.0], [-2.0, 2.5, 1.0]], np.float32),
        np.array([3, 7, 3, 3]),
        np.array([1.0, 1.0, 1.5, 1.0]),
    )
    checks = latent_checks(THRESHOLDS, reference=reference, label_probability=probability, device=CPU)
    assert {check.field: passed(check, found) for check in checks} == {
        "radius_sd": [True, True, False, True],
        "label_probability": [True, False, True, True],
        "typicality": [True, True, True, False],
        "neighbour_agreement": [True, False, True, True],
    }


def test_thresholds_that_let_everything_pass(reference: Reference) -> None:
    """Thresholds of 0 and infinity switch the checks off one by one."""
    off = Thresholds(
        max_radius_sd=np.inf,
        min_typicality=0,
        min_label_probability=0,
        min_neighbour_agreement=0,
        max_round_trip_sd=np.inf,
    )
    found = candidates(np.full((2, 3), 99.0, np.float32), np.array([3, 7]), np.array([50.0, 0.0]))
    for check in latent_checks(off, reference=reference, label_probability=probability, device=CPU):
        assert passed(check, found) == [True, True], check.field


def test_screening_asks_for_label_and_radius() -> None:
    """A draw is decoded when its label is believed and its step is small enough; nothing else is asked."""
    z = np.array([[-2.0, 99.0, 1.0], [2.0, 0.0, 1.0], [-2.0, 0.0, 1.0]], np.float32)
    passes = screening_by(
        THRESHOLDS, label_probability=lambda z, label: torch.from_numpy(probability(z.numpy(), label.numpy()))
    )
    told = (torch.from_numpy(z), torch.tensor([3, 3, 3]), torch.tensor([1.0, 0.1, 1.01]))
    assert passes(*told).tolist() == [True, False, False]
    by_radius = screening_by(THRESHOLDS, label_probability=None)
    assert by_radius(*told).tolist() == [True, True, False]


def test_a_label_model_on_images_is_no_check_of_latents(reference: Reference) -> None:
    """It reads a candidate when that is rendered again."""
    checks = latent_checks(THRESHOLDS, reference=reference, label_probability=None, device=CPU)
    assert [check.field for check in checks] == ["radius_sd", "typicality", "neighbour_agreement"]
