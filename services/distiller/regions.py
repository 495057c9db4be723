"""From failures to regions: one mixture for each confusion, so that one label can be right for a whole region."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.distiller.components import Array, fit_mixture, mahalanobis_squared


@dataclass(frozen=True, kw_only=True)
class FoundRegion:
    """A component with enough support. Members are positions in the arrays that it was found in."""

    true_label: int
    predicted_label: int
    # Share of all failures that the component explains.
    weight: float
    mean: Array  # (d,)
    covariance: Array  # (d, d)
    # Failures that it was fitted on, nearest to the mean first.
    members: Array
    # Failures of held-out sources that fall in it.
    held_out_members: Array


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """All regions, largest weight first, and what is in none."""

    regions: list[FoundRegion]
    failures: int
    failures_without_region: int
    components: int


def find_regions(
    *,
    latent: Array,
    true_label: Array,
    predicted_label: Array,
    held_out: Array,
    max_components: int,
    min_support: int,
    seed: int,
) -> Grouping:
    """Group failures, given as arrays over m of them, into regions.

    Only failures of sources that correction may use are fitted; the others are assigned afterwards.
    """
    usable = np.flatnonzero(~held_out.astype(bool))
    regions: list[FoundRegion] = []
    components = 0
    for true, predicted in _confusions(true_label[usable], predicted_label[usable]):
        same = (true_label == true) & (predicted_label == predicted)
        fitted, others = np.flatnonzero(same & ~held_out.astype(bool)), np.flatnonzero(same & held_out.astype(bool))
        if len(fitted) < min_support:
            components += 1
            continue
        # In many dimensions the variational fit hardly empties a component again: a truncation that few points cannot
        # fill would cut them into the neighbourhoods of single sources.
        truncation = min(max_components, max(1, len(fitted) // (2 * min_support)))
        found = list(_components(latent, fitted, others, truncation=truncation, seed=seed))
        components += len(found)
        regions += [
            FoundRegion(
                true_label=true,
                predicted_label=predicted,
                weight=share * len(fitted) / len(usable),
                mean=mean,
                covariance=covariance,
                members=members,
                held_out_members=held_out_members,
            )
            for share, mean, covariance, members, held_out_members in found
            if len(members) >= min_support
        ]
    regions.sort(key=lambda region: (-region.weight, region.true_label, region.predicted_label))
    return Grouping(
        regions=regions,
        failures=len(usable),
        failures_without_region=len(usable) - sum(len(region.members) for region in regions),
        components=components,
    )


def sample(mean: Array, covariance: Array, count: int, generator: np.random.Generator) -> Array:
    """Draw latents (count, d) from a region's Gaussian."""
    z = generator.multivariate_normal(mean, covariance, size=count, method="cholesky")
    return np.asarray(z, np.float32)


def exemplars(members: Array, count: int) -> Array:
    """Choose members to show: the one nearest to the mean first, then evenly out to the farthest."""
    positions = np.unique(np.linspace(0, len(members) - 1, min(count, len(members))).round().astype(int))
    return np.asarray(members[positions])


def _confusions(true_label: Array, predicted_label: Array) -> list[tuple[int, int]]:
    pairs = np.unique(np.stack([true_label, predicted_label], axis=1), axis=0)  # (p, 2)
    return [(int(true), int(predicted)) for true, predicted in pairs]


def _components(
    latent: Array, fitted: Array, others: Array, *, truncation: int, seed: int
) -> Iterator[tuple[float, Array, Array, Array, Array]]:
    """Yield (weight, mean, covariance, members, held-out members) of the mixture of one confusion."""
    mixture = fit_mixture(latent[fitted].astype(np.float64), max_components=truncation, seed=seed)
    held_out_component = mixture.assign(latent[others].astype(np.float64))
    for k, (weight, mean, covariance) in enumerate(
        zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    ):
        members = fitted[mixture.members == k]
        distance = mahalanobis_squared(latent[members], mean, covariance)
        yield (
            float(weight),
            mean,
            covariance,
            members[np.argsort(distance, kind="stable")],
            others[held_out_component == k],
        )
