from dataclasses import replace

import numpy as np
import pytest

from services.arrays import Array
from services.distiller.grouping import GroupedFailures, GroupingConfig
from services.distiller.region_split import RegionSplit, split_group

DIM, PER_SOURCE = 32, 3
CONFIG = GroupingConfig(kind="error_aware", classes=10, sd_agg=np.ones(DIM), max_components=100, min_support=15, seed=0)


def cloud(sources: int, *, centre: float = 0.0, seed: int = 0) -> GroupedFailures:
    """Plant failures of class 4 taken for 9 around sources of unit sd, three near each, in all 32 dimensions."""
    random = np.random.default_rng(seed)
    places = random.standard_normal((sources, DIM))
    places[:, 5] += centre
    latent = np.repeat(places, PER_SOURCE, axis=0) + 0.3 * random.standard_normal((PER_SOURCE * sources, DIM))
    return GroupedFailures(
        latent=latent.astype(np.float32),
        true_label=np.full(len(latent), 4),
        predicted_label=np.full(len(latent), 9),
        source=1000 * seed + np.repeat(np.arange(sources), PER_SOURCE),
    )


def together(*parts: GroupedFailures) -> tuple[GroupedFailures, Array]:
    """Return failures in one shuffled order, and which part each comes from."""
    order = np.random.default_rng(1).permutation(sum(len(part) for part in parts))
    names = ("latent", "true_label", "predicted_label", "source")
    whole = GroupedFailures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    return whole.take(order), np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]


def asked(
    failures: GroupedFailures, *, margin: Array | None = None, held_out: Array | None = None
) -> RegionSplit | None:
    """Split failures of which, unless it is said, the classifier is equally sure and none is held out."""
    nothing = np.zeros(len(failures))
    return split_group(
        failures,
        nothing if held_out is None else held_out,
        nothing - 1 if margin is None else margin,
        CONFIG,
        bootstraps=4,
    )


def agreement(found: RegionSplit, truth: Array) -> float:
    """Return the share of members that are of the most frequent truth of their part."""
    most = sum(np.bincount(truth[part.members]).max() for part in found.grouping.groups)
    return float(most / sum(len(part.members) for part in found.grouping.groups))


def test_two_places_are_two_parts() -> None:
    """Two clouds in one region, far apart along one of 32 dimensions, are parts with the right members and places."""
    failures, truth = together(cloud(50), cloud(30, centre=10.0, seed=1))
    found = asked(failures)
    assert found
    assert [len(part.members) for part in found.grouping.groups] == [150, 90]
    assert agreement(found, truth) == 1
    for part, centre in zip(found.grouping.groups, (0.0, 10.0), strict=True):
        assert (part.true_label, part.predicted_label) == (4, 9)
        assert part.gaussian.mean[5] == pytest.approx(centre, abs=0.5)
    assert found.stability.min() > 0.9


@pytest.mark.parametrize("sources", [8, 40, 200])
def test_one_cloud_has_no_parts(sources: int) -> None:
    """A round cloud is not cut into the neighbourhoods of its sources, however few or many there are."""
    assert asked(cloud(sources)) is None


def test_a_part_s_gaussian_is_its_own() -> None:
    """A part of few failures does not lean on the spread of the whole region, in which another part lies."""
    failures, _ = together(cloud(60), cloud(20, centre=9.0, seed=1))
    found = asked(failures)
    assert found
    assert all(part.gaussian.covariance[5, 5] < 3 for part in found.grouping.groups)
    first, second = found.grouping.groups
    assert first.gaussian.overlap(second.gaussian) < 0.01


def test_held_out_failures_are_assigned() -> None:
    """Those of held-out sources fall in the part that they lie in, and none is fitted."""
    failures, truth = together(cloud(50), cloud(30, centre=10.0, seed=1))
    held_out = (failures.source % 4 == 0).astype(np.uint8)
    found = asked(failures, held_out=held_out)
    assert found
    for part in found.grouping.groups:
        assert (held_out[part.members] == 0).all()
        assert (held_out[part.held_out_members] == 1).all()
        assert len(np.unique(truth[np.r_[part.members, part.held_out_members]])) == 1
    assert sum(len(part.held_out_members) for part in found.grouping.groups) == held_out.sum()


def test_one_place_is_split_by_how_sure_the_classifier_is() -> None:
    """Where failures lie in one cloud, those of a small and of a large margin are parts."""
    failures = cloud(60)
    sure = failures.source % 3 == 0
    margin = np.where(sure, -6.0, -1.0) + 0.4 * np.random.default_rng(2).standard_normal(len(failures))
    found = asked(failures, margin=margin)
    assert found
    assert [len(part.members) for part in found.grouping.groups] == [120, 60]
    assert agreement(found, sure.astype(int)) == 1


def test_confusions_are_parts_whatever_the_run_s_mixture() -> None:
    """A region of a plain mixture that shows two confusions at one place is split into them."""
    one, other = cloud(40), cloud(25, seed=1)
    failures, truth = together(one, replace(other, predicted_label=np.full(len(other), 7)))
    found = split_group(
        failures,
        np.zeros(len(failures)),
        np.full(len(failures), -1.0),
        replace(CONFIG, kind="plain"),
        bootstraps=4,
    )
    assert found
    assert [part.profile for part in found.grouping.groups] == [[((4, 9), 120)], [((4, 7), 75)]]
    assert agreement(found, truth) == 1


def test_parts_of_a_small_region_may_be_small() -> None:
    """A part may have fewer failures than a region of the run must, down to a quarter of what is split."""
    failures, truth = together(cloud(12), cloud(5, centre=12.0, seed=1))
    found = asked(failures)
    assert found
    assert [len(part.members) for part in found.grouping.groups] == [36, 15]
    fewer, _ = together(cloud(30), cloud(3, centre=12.0, seed=1))
    assert asked(fewer) is None
    assert agreement(found, truth) == 1


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_hardly_any_failures(failures: int) -> None:
    """A region too small for two parts has none, without an error."""
    assert asked(cloud(1).take(np.arange(failures))) is None


def test_same_seed_same_parts() -> None:
    """A split is its failures and the run's seed."""
    failures, _ = together(cloud(50), cloud(30, centre=10.0, seed=1))
    first, again = asked(failures), asked(failures)
    assert first
    assert again
    np.testing.assert_array_equal(first.stability, again.stability)
    for one, other in zip(first.grouping.groups, again.grouping.groups, strict=True):
        np.testing.assert_array_equal(one.members, other.members)
