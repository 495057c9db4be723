import numpy as np

from services.distiller.findings import (
    Finding,
    FreshErrors,
    RunEvidence,
    SearchedImages,
    Surroundings,
    TrainingImages,
    find_regions,
)
from services.distiller.grouping import Group, GroupedFailures
from services.latent_space.rendering import NO_SOURCE
from services.statistics.gaussian import Gaussian

RANDOM = np.random.default_rng(0)
# Three groups of 30: a rare one, a typical one, and one whose decodes are misread no more often than reconstructions.
CENTRES, REAL_IMAGES, ERRORS = np.array([[0.0, 0], [20, 0], [40, 0]]), [100, 400, 500], [90, 60, 12]
LATENT = np.repeat(CENTRES, 30, axis=0) + RANDOM.standard_normal((90, 2))
KNOWN = RunEvidence(
    failures=GroupedFailures(
        latent=LATENT, true_label=np.zeros(90, int), predicted_label=np.ones(90, int), source=np.arange(90)
    ),
    around=Surroundings(
        searched=SearchedImages(
            row=np.arange(1000),
            latent=np.repeat(CENTRES, REAL_IMAGES, axis=0) + 0.1 * RANDOM.standard_normal((1000, 2)),
            label=np.zeros(1000, int),
            wrong_on_image=np.zeros(1000, bool),
            wrong_on_reconstruction=np.arange(1000) % 10 == 0,
        ),
        training=TrainingImages(
            latent=np.repeat(CENTRES, 20, axis=0) + RANDOM.standard_normal((60, 2)),
            label=np.zeros(60, int),
            predicted=np.zeros(60, int),
            row=np.arange(60),
        ),
        sd_agg=np.ones(2),
    ),
    classes=["a", "b"],
)
GROUPS = [
    Group(
        true_label=0,
        predicted_label=1,
        gaussian=Gaussian(mean=centre, covariance=np.eye(2)),
        members=np.arange(30 * number, 30 * number + 30),
        # The second group has twice as many sources as the others.
        independent_members=np.arange(30 * number, 30 * number + (30 if number == 1 else 15)),
        held_out_members=np.zeros(0, int),
        profile=[((0, 1), 30)],
    )
    for number, centre in enumerate(CENTRES)
]


def found_at(false_discovery_rate: float) -> list[Finding]:
    return find_regions(
        GROUPS,
        np.array([0.5, 0.6, 0.7]),
        KNOWN,
        errors=lambda number, _: FreshErrors(errors=ERRORS[number], source=np.full(100, NO_SOURCE)),
        controls=100,
        false_discovery_rate=false_discovery_rate,
    )


def test_groups_no_worse_than_controls_are_dropped_and_the_others_ranked() -> None:
    """A group that fails as often as its controls is no region; regions of many sources come first."""
    found = found_at(0.05)
    assert [finding.group is GROUPS[number] for finding, number in zip(found, (1, 0), strict=True)] == [True, True]
    broad, narrow = found
    assert (broad.stability, narrow.stability) == (0.6, 0.5)
    np.testing.assert_allclose([broad.score, narrow.score], [0.5 * 30 / 90, 0.8 * 15 / 90], atol=0.03)
    assert broad.novelty_sd is None
    assert len(broad.nearest_misclassified.row) == 0


def test_a_rate_of_one_keeps_every_group() -> None:
    """Also one whose trial says nothing at all."""
    assert len(found_at(1.0)) == len(GROUPS)


def test_no_groups_no_regions() -> None:
    """A run without groups has no regions, and nothing is decoded."""
    assert find_regions([], np.zeros(0), KNOWN, errors=lambda *_: 1 // 0, controls=100, false_discovery_rate=0.05) == []
