"""Planted spots are chosen by seed and hidden from what is handed over."""

from typing import Any

import numpy as np
import pytest

from benchmarks.planted.attributes import ATTRIBUTES
from benchmarks.planted.spots import LEAST_IMAGES, OCCLUSION, SCORED_SPLITS, SPOTS, SUB_TYPE, SpotPlan, plan_spots
from tests.unit.benchmarks.planted.images import flat, photographs


def planned(**options: Any) -> SpotPlan:
    return plan_spots(photographs(), features=flat, **{"seed": 0, "least": 15, **options})


def test_spots_take_different_classes_and_kinds() -> None:
    for seed in range(5):
        spots = planned(seed=seed).spots
        assert len(spots) == SPOTS
        assert len({spot.kind for spot in spots}) == len({spot.true_label for spot in spots}) == SPOTS
        assert all(spot.wrong_label != spot.true_label for spot in spots)


def test_spots_follow_from_the_seed_alone() -> None:
    def chosen(seed: int) -> list[Any]:
        return [(spot.kind, spot.above, spot.confusion) for spot in planned(seed=seed).spots]

    assert chosen(3) == chosen(3)
    assert len({str(chosen(seed)) for seed in range(5)}) > 1


def test_nothing_of_a_spot_is_handed_over() -> None:
    plan = planned()
    whole, handed = plan.data, plan.handed_over()
    for split, images in whole.images.items():
        given = {image.tobytes() for image in handed.images[split]}
        hidden = [image for spot in plan.spots for image in images[spot.members[split]]]
        assert hidden
        assert not given & {image.tobytes() for image in hidden}
        assert len(given) + len(hidden) == len(images)


def test_a_spot_is_the_outer_part_of_its_class() -> None:
    plan = planned()
    for spot in plan.spots:
        for split, labels in plan.data.labels.items():
            inside = spot.members[split]
            assert (labels[inside] == spot.true_label).all()
            values = ATTRIBUTES[spot.kind](plan.data.images[split])
            rest = (labels == spot.true_label) & ~inside
            edge = (
                values[inside].min() >= values[rest].max() if spot.above else values[inside].max() <= values[rest].min()
            )
            assert edge


def test_a_mislabelled_classifier_learns_the_wrong_labels() -> None:
    plan = planned()
    _, labels = plan.mislabelled()
    for spot in plan.spots:
        assert (labels[spot.members["train"]] == spot.wrong_label).all()
    others = ~plan.hidden("train")
    assert (labels[others] == plan.data.labels["train"][others]).all()


def test_scored_images_were_not_trained_on() -> None:
    plan = planned()
    trained = {image.tobytes() for image in plan.mislabelled()[0]}
    for spot in plan.spots:
        assert spot.scored == len(plan.scored_images(spot)) == sum(spot.members[split].sum() for split in SCORED_SPLITS)
        assert not trained & {image.tobytes() for image in plan.scored_images(spot)}


def test_a_spot_with_fewer_than_40_scored_images_is_not_planted() -> None:
    assert LEAST_IMAGES == 40
    # Of 200 images of a class 80 are scored, and 30 % of them are in a spot.
    assert plan_spots(photographs(200), seed=0, features=flat).spots == ()
    plan = plan_spots(photographs(500), seed=0, features=flat)
    assert len(plan.spots) == SPOTS
    assert all(spot.scored >= LEAST_IMAGES for spot in plan.spots)
    assert not plan.shortfall


def test_fewer_spots_are_planted_and_told() -> None:
    plan = planned(kinds=["brightness"])
    assert [spot.kind for spot in plan.spots] == ["brightness"]
    assert plan.shortfall.startswith("1 of 3 spots")


def test_an_occluded_image_has_a_bar_and_its_class_has_others() -> None:
    before, plan = photographs(), planned(kinds=[OCCLUSION])
    (spot,) = plan.spots
    for split, images in plan.data.images.items():
        changed = (images != before.images[split]).any(axis=(1, 2, 3))
        assert (changed == spot.members[split]).all()
    share = spot.members["train"].sum() / (plan.data.labels["train"] == spot.true_label).sum()
    assert share == pytest.approx(0.3, abs=0.02)


def test_a_sub_type_is_a_cluster_of_features() -> None:
    random = np.random.default_rng(0)
    data = photographs()
    clusters = {split: random.integers(3, size=len(labels)) for split, labels in data.labels.items()}
    for split, images in data.images.items():
        images[...] = 80 * clusters[split][:, None, None, None] + random.integers(9, size=images.shape)
    plan = plan_spots(data, seed=0, features=flat, kinds=[SUB_TYPE], least=15)
    (spot,) = plan.spots
    inside = np.concatenate([clusters[split][spot.members[split]] for split in data.images])
    assert len(np.unique(inside)) == 1
