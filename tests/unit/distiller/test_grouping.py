from dataclasses import replace

import numpy as np
import pytest

from services.distiller.gaussian import Gaussian
from services.distiller.grouping import Failures, Group, Grouping, GroupingConfig, group
from tests.unit.distiller.failures import PLANTED, Cluster, Truth, planted

CONFIG = GroupingConfig(kind="error_aware", max_components=20, min_support=15, seed=0)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return planted()


@pytest.fixture(scope="module")
def grouping(truth: Truth) -> Grouping:
    return group(truth.failures, truth.held_out, CONFIG)


def cluster_of(found: Group, truth: Truth) -> int:
    [cluster] = np.unique(truth.cluster[found.members])
    return int(cluster)


def test_planted_clusters_are_found_one_to_one(grouping: Grouping, truth: Truth) -> None:
    """Every cluster with support is one group with its confusion, its place and all its failures, largest first."""
    assert [cluster_of(found, truth) for found in grouping.groups] == [0, 1, 2]
    for found, cluster in zip(grouping.groups, PLANTED, strict=False):
        assert (found.true_label, found.predicted_label) == cluster.confusion
        assert found.profile == [(cluster.confusion, len(found.members))]
        np.testing.assert_allclose(found.gaussian.mean, cluster.centre, atol=0.3)


def test_held_out_failures_are_assigned(grouping: Grouping, truth: Truth) -> None:
    """Each held-out failure falls in the group of its cluster, and none is a member."""
    for cluster, found in enumerate(grouping.groups):
        here = truth.cluster == cluster
        np.testing.assert_array_equal(found.held_out_members, np.flatnonzero(here & (truth.held_out == 1)))
        np.testing.assert_array_equal(np.sort(found.members), np.flatnonzero(here & (truth.held_out == 0)))


def test_held_out_failures_are_never_fitted(grouping: Grouping, truth: Truth) -> None:
    """Moving every held-out failure leaves means and covariances as they are, to the last bit."""
    latent = truth.failures.latent + 3 * truth.held_out[:, None].astype(np.float32)
    moved = group(replace(truth.failures, latent=latent), truth.held_out, CONFIG)
    for found, other in zip(grouping.groups, moved.groups, strict=True):
        np.testing.assert_array_equal(found.gaussian.mean, other.gaussian.mean)
        np.testing.assert_array_equal(found.gaussian.covariance, other.gaussian.covariance)


def test_what_is_too_small_is_counted() -> None:
    """A component or a confusion below the least number of failures is no group."""
    clusters = (
        Cluster(confusion=(0, 1), centre=(-4, 0), size=130),
        Cluster(confusion=(0, 1), centre=(4, 0), size=12),
        Cluster(confusion=(2, 1), centre=(-4, 0), size=19),
    )
    truth = planted(clusters, held_out_share=0.0)
    few = group(truth.failures, truth.held_out, replace(CONFIG, min_support=20))
    assert [len(found.members) for found in few.groups] == [130]
    assert (few.failures, few.found, few.below_support, few.merged) == (161, 3, 2, 0)
    assert len(group(truth.failures, truth.held_out, replace(CONFIG, min_support=12)).groups) == 3


def test_a_plain_mixture_knows_places_only(truth: Truth) -> None:
    """Without labels, confusions at one place are one group; its profile tells them, the most frequent one first."""
    plain = group(truth.failures, truth.held_out, replace(CONFIG, kind="plain"))
    mixed = next(found for found in plain.groups if found.gaussian.mean[0] < -2)
    usable = truth.held_out == 0
    counts = [int((usable & (truth.cluster == cluster)).sum()) for cluster in (0, 2)]
    assert mixed.profile == [((0, 1), counts[0]), ((2, 1), counts[1])]
    assert (mixed.true_label, mixed.predicted_label) == (0, 1)


def test_a_round_cloud_in_many_dimensions_stays_whole() -> None:
    """One cloud of few points in 24 dimensions is not cut into the neighbourhoods of its sources."""
    latent = np.random.default_rng(0).standard_normal((100, 24)).astype(np.float32)
    labels = np.zeros(100, int)
    failures = Failures(latent=latent, true_label=labels, predicted_label=labels + 1, source=np.arange(100))
    assert [len(found.members) for found in group(failures, labels, CONFIG).groups] == [100]


def test_failures_of_one_source_are_no_new_evidence() -> None:
    """A cloud of sources with five failures each, close together, is not cut into the sources' neighbourhoods."""
    random = np.random.default_rng(0)
    sources = random.standard_normal((200, 8))
    latent = np.repeat(sources, 5, axis=0) + 0.2 * random.standard_normal((1000, 8))
    labels = np.zeros(1000, int)
    failures = Failures(
        latent=latent.astype(np.float32),
        true_label=labels,
        predicted_label=labels + 1,
        source=np.repeat(np.arange(200), 5),
    )
    assert [len(found.members) for found in group(failures, labels, CONFIG).groups] == [1000]


def test_groups_that_are_the_same_become_one(monkeypatch: pytest.MonkeyPatch, truth: Truth) -> None:
    """Components of one confusion that overlap are merged and counted, those of other confusions or places are not."""
    halves = np.arange(len(truth.failures)) % 2

    class Halved:
        """A mixture that cut every cluster in two at random."""

        believed = 0.16 * np.eye(2)

        def __init__(self, *_: object) -> None:
            pass

        def labels(self, _failures: Failures) -> np.ndarray:
            return 2 * truth.cluster + halves

    monkeypatch.setattr("services.distiller.grouping.Grouper", Halved)
    merged = group(truth.failures, truth.held_out, CONFIG)
    assert [cluster_of(found, truth) for found in merged.groups] == [0, 1, 2]
    assert merged.merged == 3


def test_members_begin_at_the_mean(grouping: Grouping, truth: Truth) -> None:
    """Members are ordered by their distance from the mean in units of the covariance."""
    for found in grouping.groups:
        distance = found.gaussian.distance_squared(truth.failures.latent[found.members])
        assert (np.diff(distance) > -1e-9).all()


def test_same_seed_same_groups(grouping: Grouping, truth: Truth) -> None:
    """A grouping is its failures and its seed."""
    for found, again in zip(grouping.groups, group(truth.failures, truth.held_out, CONFIG).groups, strict=True):
        np.testing.assert_array_equal(found.members, again.members)


def test_no_usable_failures(truth: Truth) -> None:
    """Without failures, or with held-out ones only, there are no groups and no error."""
    none = truth.failures.take(np.zeros(0, int))
    for failures, held_out in ((none, np.zeros(0)), (truth.failures, np.ones(len(truth.failures)))):
        nothing = Grouping(groups=[], failures=0, found=0, below_support=0, merged=0)
        assert group(failures, held_out, CONFIG) == nothing


def test_a_group_s_gaussian_leans_on_what_is_believed() -> None:
    """Few failures leave the covariance near the believed one, many make it their own."""
    random, believed = np.random.default_rng(0), 4.0 * np.eye(2)
    few, many = (Gaussian.of(random.standard_normal((count, 2)), believed) for count in (2, 5000))
    assert few.covariance.trace() > 4
    np.testing.assert_allclose(many.covariance, np.eye(2), atol=0.1)
