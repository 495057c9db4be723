from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from services.distiller.regions import FoundRegion, Grouping, exemplars, find_regions, sample

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A planted region."""

    confusion: tuple[int, int]
    centre: tuple[float, float]
    size: int


# Two confusions lie at the same place; one confusion has two places; the last has too few failures.
PLANTED = (
    Cluster(confusion=(0, 1), centre=(-4, 0), size=120),
    Cluster(confusion=(0, 1), centre=(4, 0), size=80),
    Cluster(confusion=(2, 1), centre=(-4, 0), size=60),
    Cluster(confusion=(1, 2), centre=(0, 5), size=8),
)


def planted(clusters: tuple[Cluster, ...] = PLANTED, held_out_share: float = 0.25) -> dict[str, Array]:
    """Plant failures in shuffled order, a share of each cluster held out; `cluster` says which one."""
    random = np.random.default_rng(0)
    cluster = random.permutation(np.repeat(np.arange(len(clusters)), [one.size for one in clusters]))
    centres = np.array([one.centre for one in clusters])
    confusions = np.array([one.confusion for one in clusters])
    return {
        "cluster": cluster,
        "latent": (centres[cluster] + 0.4 * random.standard_normal((len(cluster), 2))).astype(np.float32),
        "true_label": confusions[cluster, 0],
        "predicted_label": confusions[cluster, 1],
        "held_out": (random.random(len(cluster)) < held_out_share).astype(np.uint8),
    }


def group(failures: dict[str, Array], *, min_support: int = 15, max_components: int = 8, seed: int = 0) -> Grouping:
    arrays = {name: array for name, array in failures.items() if name != "cluster"}
    return find_regions(**arrays, min_support=min_support, max_components=max_components, seed=seed)


@pytest.fixture(scope="module")
def failures() -> dict[str, Array]:
    return planted()


@pytest.fixture(scope="module")
def grouping(failures: dict[str, Array]) -> Grouping:
    return group(failures)


def cluster_of(region: FoundRegion, failures: dict[str, Array]) -> int:
    [cluster] = np.unique(failures["cluster"][region.members])
    return int(cluster)


def test_planted_clusters_are_found_one_to_one(grouping: Grouping, failures: dict[str, Array]) -> None:
    """Every cluster with support is one region with its confusion, its place and all its failures, largest first."""
    assert [cluster_of(region, failures) for region in grouping.regions] == [0, 1, 2]
    for region, cluster in zip(grouping.regions, PLANTED, strict=False):
        assert (region.true_label, region.predicted_label) == cluster.confusion
        np.testing.assert_allclose(region.mean, cluster.centre, atol=0.3)


def test_a_region_has_one_confusion(grouping: Grouping, failures: dict[str, Array]) -> None:
    """Failures of different confusions are never in one region, also where their latents lie together."""
    for region in grouping.regions:
        for members in (region.members, region.held_out_members):
            assert set(failures["true_label"][members]) == {region.true_label}
            assert set(failures["predicted_label"][members]) == {region.predicted_label}


def test_held_out_failures_are_assigned(grouping: Grouping, failures: dict[str, Array]) -> None:
    """Each held-out failure of a confusion falls in the region of its cluster, and none is a member."""
    for cluster, region in enumerate(grouping.regions):
        here = failures["cluster"] == cluster
        np.testing.assert_array_equal(region.held_out_members, np.flatnonzero(here & (failures["held_out"] == 1)))
        np.testing.assert_array_equal(np.sort(region.members), np.flatnonzero(here & (failures["held_out"] == 0)))


def test_held_out_failures_are_never_fitted(grouping: Grouping, failures: dict[str, Array]) -> None:
    """Moving every held-out failure leaves means, covariances and weights as they are, to the last bit."""
    moved = failures | {"latent": failures["latent"] + 3 * failures["held_out"][:, None].astype(np.float32)}
    for region, other in zip(grouping.regions, group(moved).regions, strict=True):
        np.testing.assert_array_equal(region.mean, other.mean)
        np.testing.assert_array_equal(region.covariance, other.covariance)
        assert region.weight == other.weight


def test_min_support() -> None:
    """A component or a confusion below the least number of failures is no region; its failures have none."""
    failures = planted(
        (
            Cluster(confusion=(0, 1), centre=(-4, 0), size=130),
            Cluster(confusion=(0, 1), centre=(4, 0), size=12),
            Cluster(confusion=(2, 1), centre=(-4, 0), size=19),
        ),
        held_out_share=0.0,
    )
    grouping = group(failures, min_support=20)
    [region] = grouping.regions
    assert len(region.members) == 130
    assert (grouping.failures, grouping.failures_without_region, grouping.components) == (161, 31, 3)
    assert len(group(failures, min_support=12).regions) == 3


def test_few_failures_are_not_cut_into_sources() -> None:
    """One round cloud in many dimensions stays in pieces of twice the least support on average, at most."""
    latent = np.random.default_rng(0).standard_normal((100, 24)).astype(np.float32)
    labels = np.zeros(100, int)
    failures = {"latent": latent, "true_label": labels, "predicted_label": labels + 1, "held_out": labels}
    assert group(failures, min_support=40, max_components=10).components == 1
    assert group(failures, min_support=15, max_components=10).components <= 3


def test_weights_are_shares_of_all_failures(grouping: Grouping) -> None:
    """A region's weight is its share of the usable failures; with what is in no region, they are all of them."""
    for region in grouping.regions:
        assert abs(region.weight - len(region.members) / grouping.failures) < 0.03
    total = sum(region.weight for region in grouping.regions)
    assert abs(total + grouping.failures_without_region / grouping.failures - 1) < 0.05
    assert total <= 1


def test_members_begin_at_the_medoid(grouping: Grouping, failures: dict[str, Array]) -> None:
    """Members are ordered by their distance from the mean in units of the covariance."""
    for region in grouping.regions:
        step = failures["latent"][region.members] - region.mean
        distance = (step @ np.linalg.inv(region.covariance) * step).sum(axis=1)
        assert (np.diff(distance) > -1e-9).all()


def test_same_seed_same_regions(grouping: Grouping, failures: dict[str, Array]) -> None:
    """A grouping is its failures and its seed."""
    for region, again in zip(grouping.regions, group(failures).regions, strict=True):
        np.testing.assert_array_equal(region.members, again.members)
        np.testing.assert_array_equal(region.covariance, again.covariance)


def test_no_usable_failures(failures: dict[str, Array]) -> None:
    """Without failures, or with held-out ones only, there are no regions and no error."""
    nothing = {name: array[:0] for name, array in failures.items()}
    all_held_out = failures | {"held_out": np.ones_like(failures["held_out"])}
    for given in (nothing, all_held_out):
        assert group(given) == Grouping(regions=[], failures=0, failures_without_region=0, components=0)


def test_samples_have_the_region_s_mean_and_covariance() -> None:
    """Draws from a region are its Gaussian, and the same for the same generator."""
    mean, covariance = np.array([1.0, -2.0]), np.array([[1.0, 0.6], [0.6, 0.5]])
    z = sample(mean, covariance, 20_000, np.random.default_rng(1))
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(axis=0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.03)
    np.testing.assert_array_equal(z[:5], sample(mean, covariance, 20_000, np.random.default_rng(1))[:5])


@pytest.mark.parametrize(("count", "expected"), [(3, [10, 15, 19]), (1, [10]), (16, list(range(10, 20)))])
def test_exemplars_run_from_the_medoid_outwards(count: int, expected: list[int]) -> None:
    """The nearest member is shown first, then others evenly out to the farthest, each once."""
    np.testing.assert_array_equal(exemplars(np.arange(10, 20), count), [10, 14, 19] if count == 3 else expected)
