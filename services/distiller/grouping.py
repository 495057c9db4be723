"""Grouping of failures by a mixture, and the stability of the groups.

Each component of the mixture is split by confusion. Resampling of the failures measures the stability.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from services.arrays import Array
from services.distiller.mixture import DirichletProcessMixture
from services.statistics.gaussian import Gaussian, center_by_label

Kind = Literal["error_aware", "plain"]
# Two groups of one confusion that overlap this much are one (Bhattacharyya coefficient).
_MERGE_OVERLAP = 0.6
# A smaller rise of the bound moves no failure to another group.
_TOLERANCE = 0.1
# Makes a covariance definite: this share of it is treated as uncorrelated, and no direction is narrower than this, in
# aggregate sds.
_DIAGONAL_SHARE, _LEAST_SD = 0.01, 0.05
# Base of the numbers of confusions.
_CONFUSION_BASE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GroupedFailures:
    """Failures of one run: latents (m, d), class ids and sources (m,)."""

    latent: Array
    true_label: Array
    predicted_label: Array
    source: Array

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, rows: Array) -> "GroupedFailures":
        return GroupedFailures(
            latent=self.latent[rows],
            true_label=self.true_label[rows],
            predicted_label=self.predicted_label[rows],
            source=self.source[rows],
        )

    def independent_rows(self) -> Array:
        """Return the positions of the first failure of each source and confusion, ascending."""
        return np.sort(np.unique(self._evidence(), axis=0, return_index=True)[1])

    def source_weights(self) -> Array:
        """Return weights (m,) with which each source of a confusion counts as one failure."""
        _, position, count = np.unique(self._evidence(), axis=0, return_inverse=True, return_counts=True)
        return np.asarray(1 / count[position.ravel()])

    def _evidence(self) -> Array:
        return np.stack([self.source.astype(np.int64), self.confusion()], axis=1)

    def residuals(self) -> Array:
        """Return the latents minus the means of their confusions, (m, d)."""
        return center_by_label(self.latent, self.confusion())

    def confusion(self) -> Array:
        """Return a number for each pair of true and predicted class, (m,)."""
        return self.true_label.astype(np.int64) * _CONFUSION_BASE + self.predicted_label


@dataclass(frozen=True, kw_only=True)
class Group:
    """Failures that belong together.

    Members are positions among the given failures, nearest to the mean first.
    """

    true_label: int
    predicted_label: int
    gaussian: Gaussian
    members: Array
    held_out_members: Array
    # Members of which no two share their source: each source's member that is nearest to the mean.
    independent_members: Array
    # (true, predicted) to number of members, most frequent first
    profile: Sequence[tuple[tuple[int, int], int]]

    @property
    def source_count(self) -> int:
        """Return the number of different sources of the members."""
        return len(self.independent_members)

    def label_shares(self) -> dict[int, float]:
        """Return the share of members with each true label.

        A group of an error-aware mixture has only one true label.
        """
        counts: Counter[int] = Counter()
        for (true, _), count in self.profile:
            counts[true] += count
        return {label: count / len(self.members) for label, count in counts.items()}


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """All groups with enough sources, most sources first, and counts of the others."""

    groups: list[Group]
    failures: int
    # Groups before any was merged or left out.
    group_count: int
    below_support: int
    merged: int


@dataclass(frozen=True, kw_only=True)
class GroupingConfig:
    """The configuration of a grouping."""

    kind: Kind
    # Classes of the model; failures of any of them can be assigned.
    classes: int
    # (d,) aggregate sd of the latents: a much narrower direction is considered narrow by chance.
    sd_agg: Array
    max_components: int
    min_support: int
    seed: int
    # Expected width of a component, as a share of one confusion's.
    component_width: float = 1.0


class Grouper:
    """A mixture fitted to failures, which assigns failures to groups.

    It is fitted to one failure of each source and confusion. Further ones are steps
    from the same image and lie close to it: they are no new evidence for a group, but
    would split it into the neighbourhoods of its sources.
    """

    def __init__(
        self, failures: GroupedFailures, config: GroupingConfig, check: Callable[[], None] = lambda: None
    ) -> None:
        self._aware = config.kind == "error_aware"
        fitted = failures.take(failures.independent_rows())
        dim = fitted.latent.shape[1]
        spread = prior_covariance(fitted.residuals() if self._aware else fitted.latent, config.sd_agg)
        self.prior = config.component_width**2 * spread
        self._model = DirichletProcessMixture(
            n_components=min(config.max_components, len(fitted)),
            # A component is expected to be as wide as one confusion, which counts as d failures.
            degrees_of_freedom_prior=dim,
            covariance_prior=dim * self.prior,
            # Component means lie as far apart as the failures do, however narrow the components are.
            mean_precision_prior=config.component_width**2,
            tol=_TOLERANCE,
            random_state=config.seed % 2**63,
        )
        with warnings.catch_warnings():
            # A fit that stops at max_iter is valid: the bound has risen at every iteration.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(
                fitted.latent.astype(np.float64),
                categories=self._categories(fitted),
                category_sizes=[config.classes] * len(self._categories(fitted)),
                check=lambda _: check(),
            )

    def components(self, failures: GroupedFailures) -> Array:
        """Return the component of each failure, (m,).

        When the mixture models confusions, each pair of component and confusion has its own number.
        """
        if not len(failures):
            return np.zeros(0, np.int64)
        component = self._model.predict(failures.latent.astype(np.float64), categories=self._categories(failures))
        if not self._aware:
            return component
        return np.asarray(component * _CONFUSION_BASE**2 + failures.confusion())

    def _categories(self, failures: GroupedFailures) -> list[Array]:
        return [failures.true_label, failures.predicted_label] if self._aware else []


def group_failures(
    failures: GroupedFailures, held_out: Array, config: GroupingConfig, check: Callable[[], None] = lambda: None
) -> Grouping:
    """Group failures; those with `held_out` (m,) are assigned but not fitted.

    `check` is called repeatedly, and may raise to stop.
    """
    usable, others = np.flatnonzero(held_out == 0), np.flatnonzero(held_out != 0)
    if not len(usable):
        return Grouping(groups=[], failures=0, group_count=0, below_support=0, merged=0)
    grouper = Grouper(failures.take(usable), config, check)
    _, labels = np.unique(grouper.components(failures), return_inverse=True)
    members, held_out_members = _by_label(labels, usable), _by_label(labels, others)
    groups = [
        make_group(failures, members[label], held_out_members.get(label, others[:0]), grouper.prior)
        for label in members
    ]
    distinct = _merge_duplicates(groups, failures, grouper.prior, check)
    supported = [one for one in distinct if one.source_count >= config.min_support]
    return Grouping(
        groups=sorted(supported, key=lambda one: (-one.source_count, one.true_label, one.predicted_label)),
        failures=len(usable),
        group_count=len(groups),
        below_support=len(distinct) - len(supported),
        merged=len(groups) - len(distinct),
    )


def _by_label(labels: Array, rows: Array) -> dict[int, Array]:
    """Return the rows of each label that occurs, in ascending order."""
    order = rows[np.argsort(labels[rows], kind="stable")]
    found, begins = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, begins[1:]), strict=True)) if len(rows) else {}


def prior_covariance(x: Array, sd_agg: Array) -> Array:
    """Return the covariance (d, d) of x (n, d), made definite."""
    spread = np.atleast_2d(np.cov(x.astype(np.float64).T, bias=True))
    own = _DIAGONAL_SHARE * spread.diagonal()
    return np.asarray((1 - _DIAGONAL_SHARE) * spread + np.diag(own + (_LEAST_SD * sd_agg) ** 2))


def make_group(failures: GroupedFailures, members: Array, held_out_members: Array, prior: Array) -> Group:
    """Return the failures at some positions (n,) as a group.

    Its Gaussian is shrunk towards the covariance `prior` (d, d).
    """
    gaussian = Gaussian.of(failures.latent[members], prior)
    distance = gaussian.distance_squared(failures.latent[members])
    confusions = zip(failures.true_label[members].tolist(), failures.predicted_label[members].tolist(), strict=True)
    profile = sorted(Counter(confusions).items(), key=lambda item: (-item[1], item[0]))
    (true, predicted), _ = profile[0]
    outwards = members[np.argsort(distance, kind="stable")]
    first = np.sort(np.unique(failures.source[outwards], return_index=True)[1])
    return Group(
        true_label=true,
        predicted_label=predicted,
        gaussian=gaussian,
        members=outwards,
        independent_members=outwards[first],
        held_out_members=held_out_members,
        profile=profile,
    )


def _merge_duplicates(
    groups: list[Group], failures: GroupedFailures, prior: Array, check: Callable[[], None]
) -> list[Group]:
    """Merge groups that overlap so much that they are the same.

    The most similar groups are merged first.
    """
    left, numbers = dict(enumerate(groups)), itertools.count(len(groups))
    alike = {pair: overlap for j in left for pair, overlap in _duplicates_of(left, j) if pair[0] < pair[1]}
    while alike:
        check()
        i, j = max(alike, key=lambda pair: (alike[pair], pair))
        one, other, new = left.pop(i), left.pop(j), next(numbers)
        members = np.concatenate([one.members, other.members])
        held_out = np.sort(np.concatenate([one.held_out_members, other.held_out_members]))
        left[new] = make_group(failures, members, held_out, prior)
        alike = {pair: overlap for pair, overlap in alike.items() if not {i, j} & set(pair)}
        alike |= {(min(pair), max(pair)): overlap for pair, overlap in _duplicates_of(left, new)}
    return list(left.values())


def _duplicates_of(groups: dict[int, Group], number: int) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield the groups that duplicate one group, and their overlaps.

    Each comes as a pair of its number and the number of that group.
    """
    one = groups[number]
    for other_number, other in groups.items():
        if other_number != number and (one.true_label, one.predicted_label) == (
            other.true_label,
            other.predicted_label,
        ):
            overlap = one.gaussian.overlap(other.gaussian)
            if overlap >= _MERGE_OVERLAP:
                yield (other_number, number), overlap


# Approximate number of failures in one bootstrap fit: bounds its time for any size of run.
_MOST_FAILURES = 10_000
# Separates these draws from others of the same seed.
_STREAM = 1


def bootstrap_stability(
    failures: GroupedFailures,
    groups: Sequence[Array],
    config: GroupingConfig,
    *,
    bootstraps: int,
    check: Callable[[], None] = lambda: None,
) -> Array:
    """Return the stability (g,) of each group over bootstrap samples.

    It is the group's mean Jaccard index with the most similar group of every bootstrap sample (Hennig, Cluster-wise
    assessment of cluster stability, 2007). Sources are drawn with replacement, each with all its failures, because
    these are not independent, and each counts as one failure in the index. A source drawn twice counts once, since
    coincident points would look like a cluster. The fitted mixture then assigns all failures. `check` may raise to
    stop.
    """
    scores, weight = np.zeros((bootstraps, len(groups))), failures.source_weights()
    for number in range(bootstraps if groups else 0):
        drawn = failures.take(_drawn(failures.source, np.random.default_rng([config.seed, _STREAM, number])))
        found = Grouper(drawn, replace(config, seed=config.seed + number), check).components(failures)
        _, labels = np.unique(found, return_inverse=True)
        scores[number] = [_most_alike(members, labels, weight) for members in groups]
    return np.asarray(scores.mean(axis=0))


def stability_of(
    grouping: Grouping,
    failures: GroupedFailures,
    held_out: Array,
    config: GroupingConfig,
    *,
    bootstraps: int,
    check: Callable[[], None] = lambda: None,
) -> Array:
    """Return the stability (g,) of each group over its fitted failures.

    Failures with `held_out` (m,) were not fitted, and are left out.
    """
    usable = np.flatnonzero(held_out == 0)
    members = [np.searchsorted(usable, np.sort(group.members)) for group in grouping.groups]
    return bootstrap_stability(failures.take(usable), members, config, bootstraps=bootstraps, check=check)


def _drawn(source: Array, generator: np.random.Generator) -> Array:
    """Return the positions of all failures of resampled sources."""
    sources = np.unique(source)
    sample_size = max(1, round(len(sources) * min(1.0, _MOST_FAILURES / len(source))))
    return np.flatnonzero(np.isin(source, generator.choice(sources, sample_size)))


def _most_alike(members: Array, labels: Array, weight: Array) -> float:
    """Return the largest Jaccard index of members with one label's failures, which have weights (m,)."""
    shared, sizes = np.bincount(labels[members], weight[members], labels.max() + 1), np.bincount(labels, weight)
    return float((shared / (weight[members].sum() + sizes - shared)).max())
