from dataclasses import replace

import numpy as np
import pytest

from services.arrays import Array
from services.distiller import findings
from services.distiller.findings import FreshErrors, RealImageCounts, SearchedImages, TrainingImages
from services.distiller.grouping import Group, GroupedFailures
from services.latent_space.rendering import NO_SOURCE
from services.statistics.gaussian import Gaussian

ONES = np.ones(2)
UNSOURCED = FreshErrors(errors=0, source=np.full(3, NO_SOURCE))


def group(*, members: int = 20, centre: float = 0.0) -> Group:
    """Class 0 taken for 1, unit sd around (centre, 0)."""
    return Group(
        true_label=0,
        predicted_label=1,
        gaussian=Gaussian(mean=np.array([centre, 0.0]), covariance=np.eye(2)),
        members=np.arange(members),
        independent_members=np.arange(members),
        held_out_members=np.zeros(0, int),
        profile=[((0, 1), members)],
    )


def searched(
    latent: Array, *, label: object = 0, image: object = False, reconstruction: object = False
) -> SearchedImages:
    count = len(latent)
    return SearchedImages(
        row=10 + np.arange(count),
        latent=latent,
        label=np.broadcast_to(label, count),
        wrong_on_image=np.broadcast_to(image, count),
        wrong_on_reconstruction=np.broadcast_to(reconstruction, count),
    )


def training(latent: Array, label: Array, predicted: Array | None = None) -> TrainingImages:
    return TrainingImages(
        latent=latent,
        label=label,
        predicted=label if predicted is None else predicted,
        row=100 + np.arange(len(latent)),
    )


@pytest.mark.parametrize(("count", "expected"), [(3, [12, 15, 19]), (1, [12])])
def test_exemplars_run_from_the_medoid_outwards(count: int, expected: list[int]) -> None:
    """The member nearest to all others is shown first, then others evenly out to the farthest."""
    latent = np.zeros((20, 2))
    latent[10:20, 0] = [5, 4, 0, 1, -1, 2, -2, 3, -3, 9]
    shown = findings.choose_exemplars(latent, np.arange(10, 20), ONES, count)
    assert shown[0] == expected[0] or latent[shown[0], 0] == 1  # both are medoids
    assert len(shown) == count
    if count > 1:
        assert shown[-1] == 19


def test_controls_are_reconstructions_of_the_nearest_right_images() -> None:
    """Of its label, read correctly as they are, nearest first; an image that is wrong as it is, is no control."""
    latent = np.array([[0.1, 0], [0.2, 0], [0.3, 0], [0.4, 0], [5, 0]])
    around = searched(
        latent,
        label=[0, 0, 1, 0, 0],
        image=[True, False, False, False, False],
        reconstruction=[True, True, True, False, True],
    )
    assert findings.count_controls(group(), UNSOURCED, around, 2) == (1, 2)
    assert findings.count_controls(group(), UNSOURCED, around, 10) == (2, 3)


def test_controls_of_changed_images_are_their_sources() -> None:
    """As many as there are fresh images, each unperturbed."""
    around = searched(np.zeros((5, 2)), image=[False, False, True, False, False])
    fresh = FreshErrors(errors=1, source=np.array([14, 12, 10]))
    assert findings.count_controls(group(), fresh, around, 200) == (1, 3)


def test_a_mixed_group_has_controls_and_decodes_of_all_its_labels() -> None:
    """Controls come from the classes as the failures do; a decode carries the label of the nearest failure."""
    mixed = replace(group(), profile=[((0, 1), 15), ((2, 1), 5)])
    around = searched(np.zeros((40, 2)), label=np.repeat([0, 2], 20), reconstruction=np.repeat([False, True], 20))
    assert findings.count_controls(mixed, UNSOURCED, around, 8) == (2, 8)
    failures = GroupedFailures(
        latent=np.repeat([[0.0, 0], [9, 0]], 10, axis=0),
        true_label=np.repeat([0, 2], 10),
        predicted_label=np.ones(20, int),
        source=np.arange(20),
    )
    drawn = np.array([[1.0, 0], [8.0, 0]])
    assert findings.label_of(drawn, mixed, failures).tolist() == [0, 2]
    assert findings.label_of(drawn, group(), failures).tolist() == [0, 0]


def test_distances_far_from_the_origin() -> None:
    """A common offset of a thousand sds changes no distance."""
    x = np.random.default_rng(0).standard_normal((20, 8))
    far = findings.distances((x[:5] + 1000).astype(np.float32), (x + 1000).astype(np.float32))
    np.testing.assert_allclose(far, findings.distances(x[:5], x), atol=1e-3)


def test_real_images_inside() -> None:
    """Images of the label within the distance that holds 95 % of the failures count, and so does who is wrong."""
    failures = np.random.default_rng(0).standard_normal((2000, 2))
    latent = np.array([[0, 0], [2.2, 0], [2.7, 0], [0, 0]])  # 95 % of a plane's Gaussian lie within 2.45 sd
    around = searched(latent, label=[0, 0, 0, 1], image=[True, False, True, True])
    inside = findings.count_real_inside(group(), failures, around)
    assert inside == RealImageCounts(wrong=1, images=2, of_label=3)
    assert inside.typicality == 2 / 3
    nobody = findings.count_real_inside(group(), failures, searched(np.zeros((0, 2))))
    assert (nobody.images, nobody.typicality) == (0, 0.0)


def test_the_nearest_training_images() -> None:
    """Nearest first, by rows and labels, with distances in aggregate sds per dimension."""
    images = training(np.array([[3.0, 0], [1.0, 0], [0, 8.0]]), np.array([0, 1, 2]))
    near = findings.nearest_images(np.zeros((1, 2)), images, np.array([1.0, 4.0]), 2)
    assert (near.row.tolist(), near.label.tolist()) == ([101, 102], [1, 2])
    np.testing.assert_allclose(near.distance_sd, np.array([1, 2]) / np.sqrt(2))


def test_novelty_is_the_distance_to_known_errors() -> None:
    """Only misclassified training images count; without any there is no distance."""
    images = training(np.array([[0.0, 0], [4.0, 0]]), np.array([0, 0]), predicted=np.array([0, 1]))
    shown = np.array([[0.0, 0], [1.0, 0], [2.0, 0]])
    assert findings.novelty_sd(shown, images.misclassified(), ONES) == pytest.approx(3 / np.sqrt(2))
    assert findings.novelty_sd(shown, training(shown, np.zeros(3)).misclassified(), ONES) is None


def test_the_suggestion_is_what_most_real_images_nearby_carry() -> None:
    """Most votes of the nearest training images decide; where none has most, the sources' label stands."""
    random = np.random.default_rng(0)
    latent = 0.1 * random.standard_normal((30, 2))
    sevens = training(latent, np.full(30, 2))
    label, reason = findings.suggest_label(group(), np.zeros((1, 2)), sevens, ONES, ["zero", "one", "two"])
    assert label == "two"
    assert "20 of 20 failures are small steps from real images labelled 'zero'; 10 of 10 training images" in reason
    near, far = np.zeros((10, 2)), np.full((20, 2), 9.0)
    split = training(np.concatenate([near, far]), np.r_[np.repeat([1, 2], 5), np.zeros(20, int)])
    assert findings.suggest_label(group(), np.zeros((1, 2)), split, ONES, ["zero", "one", "two"])[0] == "zero"
