from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.distiller.grouping import Group, GroupedFailures, Grouping, GroupingConfig, group_failures
from services.statistics.gaussian import Gaussian
from tests.unit.distiller.failures import PLANTED, Cluster, Truth, planted

CONFIG = GroupingConfig(kind="error_aware", classes=3, sd_agg=np.ones(2), max_components=20, min_support=15, seed=0)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return planted()


@pytest.fixture(scope="module")
def grouping(truth: Truth) -> Grouping:
    return group_failures(truth.failures, truth.held_out, CONFIG)


def in_dimensions(dim: int, **other: Any) -> GroupingConfig:
    return replace(CONFIG, sd_agg=np.ones(dim), **other)


def halving(truth: Truth) -> type:
    """A mixture that cut every cluster in two at random."""
    divided = np.arange(len(truth.failures)) % 2

    class Halving:
        prior = 0.16 * np.eye(2)

        def __init__(self, *_: object) -> None:
            pass

        def components(self, _failures: GroupedFailures) -> np.ndarray:
            return 2 * truth.cluster + divided

    return Halving


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
    moved = group_failures(replace(truth.failures, latent=latent), truth.held_out, CONFIG)
    for found, other in zip(grouping.groups, moved.groups, strict=True):
        np.testing.assert_array_equal(found.gaussian.mean, other.gaussian.mean)
        np.testing.assert_array_equal(found.gaussian.covariance, other.gaussian.covariance)


def test_what_is_too_small_is_counted() -> None:
    """A component or a confusion below the least number of sources is no group."""
    clusters = (
        Cluster(confusion=(0, 1), centre=(-4, 0), size=130),
        Cluster(confusion=(0, 1), centre=(4, 0), size=12),
        Cluster(confusion=(2, 1), centre=(-4, 0), size=19),
    )
    truth = planted(clusters, held_out_share=0.0)
    few = group_failures(truth.failures, truth.held_out, replace(CONFIG, min_support=11))
    assert [len(found.members) for found in few.groups] == [130]
    assert (few.failures, few.group_count, few.below_support, few.merged) == (161, 3, 2, 0)
    assert len(group_failures(truth.failures, truth.held_out, replace(CONFIG, min_support=6)).groups) == 3


def test_a_plain_mixture_knows_places_only(truth: Truth) -> None:
    """Without labels, confusions at one place are one group; its profile tells them, the most frequent one first."""
    plain = group_failures(truth.failures, truth.held_out, replace(CONFIG, kind="plain"))
    mixed = next(found for found in plain.groups if found.gaussian.mean[0] < -2)
    usable = truth.held_out == 0
    counts = [int((usable & (truth.cluster == cluster)).sum()) for cluster in (0, 2)]
    assert mixed.profile == [((0, 1), counts[0]), ((2, 1), counts[1])]
    assert (mixed.true_label, mixed.predicted_label) == (0, 1)


def test_a_round_cloud_in_many_dimensions_stays_whole() -> None:
    """One cloud of few points in 24 dimensions is not cut into the neighbourhoods of its sources."""
    latent = np.random.default_rng(0).standard_normal((100, 24)).astype(np.float32)
    labels = np.zeros(100, int)
    failures = GroupedFailures(latent=latent, true_label=labels, predicted_label=labels + 1, source=np.arange(100))
    assert [len(found.members) for found in group_failures(failures, labels, in_dimensions(24)).groups] == [100]


def test_failures_of_one_source_are_no_new_evidence() -> None:
    """A cloud of sources with five failures each, close together, is not cut into the sources' neighbourhoods."""
    random = np.random.default_rng(0)
    sources = random.standard_normal((200, 8))
    latent = np.repeat(sources, 5, axis=0) + 0.2 * random.standard_normal((1000, 8))
    labels = np.zeros(1000, int)
    failures = GroupedFailures(
        latent=latent.astype(np.float32),
        true_label=labels,
        predicted_label=labels + 1,
        source=np.repeat(np.arange(200), 5),
    )
    assert [len(found.members) for found in group_failures(failures, labels, in_dimensions(8)).groups] == [1000]


@pytest.mark.parametrize("held_out", [0, 1])
def test_a_class_that_was_not_fitted_is_assigned(held_out: int) -> None:
    """The one failure of the highest class, held out or not, breaks nothing and is in a group of its own."""
    truth = planted()
    more = GroupedFailures(
        latent=np.concatenate([truth.failures.latent, [[9.0, 9.0]]]).astype(np.float32),
        true_label=np.append(truth.failures.true_label, 7),
        predicted_label=np.append(truth.failures.predicted_label, 8),
        source=np.append(truth.failures.source, 9999),
    )
    found = group_failures(more, np.append(truth.held_out, held_out), replace(CONFIG, classes=9))
    assert [len(one.members) for one in found.groups] == [len(one.members) for one in found.groups[:3]]
    last = len(truth.failures)
    assert all(last not in one.members and last not in one.held_out_members for one in found.groups)


@pytest.mark.parametrize(("sources", "failures", "kind"), [(1, 20, "error_aware"), (1, 20, "plain"), (2, 2, "plain")])
def test_few_sources_have_a_definite_covariance(sources: int, failures: int, kind: Any) -> None:
    """Where there are fewer sources than it takes for a spread, it is that of the latents."""
    latent = np.random.default_rng(0).standard_normal((failures, 32)).astype(np.float32)
    ones = np.ones(failures, int)
    given = GroupedFailures(
        latent=latent, true_label=0 * ones, predicted_label=ones, source=np.arange(failures) % sources
    )
    [found] = group_failures(given, 0 * ones, in_dimensions(32, kind=kind, min_support=1)).groups
    assert np.isfinite(found.gaussian.distance_squared(latent)).all()
    assert np.linalg.eigvalsh(found.gaussian.covariance).min() > 1e-4


def test_scales_of_dimensions_do_not_mix() -> None:
    """A dimension a hundred thousand times as wide as another leaves the other's variance alone."""
    truth = planted()
    plain = group_failures(truth.failures, truth.held_out, CONFIG)
    scale = np.array([1e4, 0.1])
    latent = (truth.failures.latent * scale).astype(np.float32)
    found = group_failures(replace(truth.failures, latent=latent), truth.held_out, replace(CONFIG, sd_agg=scale))
    for scaled, one in zip(found.groups, plain.groups, strict=True):
        covariance = scaled.gaussian.covariance / scale / scale[:, None]
        np.testing.assert_allclose(covariance, one.gaussian.covariance, rtol=1e-3)


def test_parts_below_support_are_merged_first(monkeypatch: pytest.MonkeyPatch, truth: Truth) -> None:
    """Two parts of one group that are too small each are one that is not."""
    monkeypatch.setattr("services.distiller.grouping.Grouper", halving(truth))
    smallest = len(np.unique(truth.failures.source[(truth.cluster == 2) & (truth.held_out == 0)]))
    found = group_failures(truth.failures, truth.held_out, replace(CONFIG, min_support=smallest))
    assert [cluster_of(one, truth) for one in found.groups] == [0, 1, 2]


def test_groups_that_are_the_same_become_one(monkeypatch: pytest.MonkeyPatch, truth: Truth) -> None:
    """Components of one confusion that overlap are merged and counted, those of other confusions or places are not."""
    monkeypatch.setattr("services.distiller.grouping.Grouper", halving(truth))
    merged = group_failures(truth.failures, truth.held_out, CONFIG)
    assert [cluster_of(found, truth) for found in merged.groups] == [0, 1, 2]
    assert merged.merged == 4


@pytest.mark.parametrize(("width", "groups"), [(1.0, 1), (1 / 3, 2)])
def test_narrower_components_tell_what_lies_close(width: float, groups: int) -> None:
    """Few failures at two places are one group, unless components are believed to be narrower than all of them."""
    clusters = tuple(Cluster(confusion=(0, 1), centre=(x, 0), size=30) for x in (-1.5, 1.5))
    truth = planted(clusters, held_out_share=0.0)
    line = replace(truth.failures, latent=truth.failures.latent[:, :1])
    found = group_failures(line, truth.held_out, in_dimensions(1, component_width=width, min_support=10))
    assert len(found.groups) == groups
    if groups == 2:
        assert sorted(cluster_of(one, truth) for one in found.groups) == [0, 1]


def test_members_begin_at_the_mean(grouping: Grouping, truth: Truth) -> None:
    """Members are ordered by their distance from the mean in units of the covariance."""
    for found in grouping.groups:
        distance = found.gaussian.distance_squared(truth.failures.latent[found.members])
        assert (np.diff(distance) > -1e-9).all()


def test_same_seed_same_groups(grouping: Grouping, truth: Truth) -> None:
    """A grouping is its failures and its seed."""
    for found, again in zip(
        grouping.groups, group_failures(truth.failures, truth.held_out, CONFIG).groups, strict=True
    ):
        np.testing.assert_array_equal(found.members, again.members)


def test_no_usable_failures(truth: Truth) -> None:
    """Without failures, or with held-out ones only, there are no groups and no error."""
    none = truth.failures.take(np.zeros(0, int))
    for failures, held_out in ((none, np.zeros(0)), (truth.failures, np.ones(len(truth.failures)))):
        nothing = Grouping(groups=[], failures=0, group_count=0, below_support=0, merged=0)
        assert group_failures(failures, held_out, CONFIG) == nothing


def test_a_group_s_gaussian_leans_on_what_is_believed() -> None:
    """Few failures leave the covariance near the believed one, many make it their own."""
    random, prior = np.random.default_rng(0), 4.0 * np.eye(2)
    few, many = (Gaussian.of(random.standard_normal((count, 2)), prior) for count in (2, 5000))
    assert few.covariance.trace() > 4
    np.testing.assert_allclose(many.covariance, np.eye(2), atol=0.1)
