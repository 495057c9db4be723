"""Findings: groups of failures that are worse than their controls."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.arrays import Array
from services.distiller.grouping import Group, GroupedFailures
from services.latent_space.rendering import NO_SOURCE
from services.statistics.hypothesis_tests import ErrorRateTest, q_values

# Share of a group's failures that lies inside it.
_INSIDE = 0.95
# Members of a group that are compared: bounds memory and time.
_MOST_MEMBERS = 2_000
# Nearest training images of each exemplar that vote on the label.
_VOTES = 10


@dataclass(frozen=True, kw_only=True)
class SearchedImages:
    """The s searched real images, with the served classifier's answers."""

    row: Array  # (s,) of the searched split, ascending
    latent: Array  # (s, d) posterior means
    label: Array  # (s,) class ids
    wrong_on_image: Array  # (s,) bool
    wrong_on_reconstruction: Array  # (s,) bool


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The r training images, with the served classifier's answers."""

    latent: Array  # (r, d) posterior means
    label: Array  # (r,) class ids
    predicted: Array  # (r,) class ids
    row: Array  # (r,) of the training split

    def misclassified(self) -> "TrainingImages":
        wrong = self.predicted != self.label
        return TrainingImages(
            latent=self.latent[wrong], label=self.label[wrong], predicted=self.predicted[wrong], row=self.row[wrong]
        )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The real images around a run's failures, in the searched latent space."""

    searched: SearchedImages
    training: TrainingImages
    sd_agg: Array  # (d,) aggregate sd of latents


@dataclass(frozen=True, kw_only=True)
class RealImageCounts:
    """Numbers of real images that have a group's label.

    `images` lie inside the group, `wrong` of these are misclassified, and `of_label` is the number in all.
    """

    wrong: int
    images: int
    of_label: int

    @property
    def typicality(self) -> float:
        """Return the share of the label's real images that lie inside."""
        return self.images / self.of_label if self.of_label else 0.0


@dataclass(frozen=True, kw_only=True)
class NearestImages:
    """Training images (n,), nearest first, with their distances.

    Distances are in aggregate sds per dimension.
    """

    row: Array
    label: Array
    predicted: Array
    distance_sd: Array


def choose_exemplars(latent: Array, members: Array, sd_agg: Array, count: int) -> Array:
    """Return the members of a group that are shown.

    The medoid comes first, and the others follow at even ranks up to the farthest one.
    """
    x = latent[members] / sd_agg
    few = x[np.linspace(0, len(x) - 1, min(len(x), _MOST_MEMBERS)).astype(int)]
    medoid = few[distances(few, few).sum(axis=1).argmin()]
    outwards = np.argsort(distances(x, medoid[None])[:, 0], kind="stable")
    chosen = np.unique(np.linspace(0, len(x) - 1, min(count, len(x))).round().astype(int))
    return np.asarray(members[outwards[chosen]])


@dataclass(frozen=True, kw_only=True)
class FreshErrors:
    """The misclassified ones among the fresh images of a group."""

    errors: int
    # (n,) sources of all n fresh images, or NO_SOURCE
    source: Array


def count_controls(group: Group, fresh: FreshErrors, searched: SearchedImages, count: int) -> tuple[int, int]:
    """Return the numbers of misclassified and of all controls of a group.

    Fresh images that are changes of real ones have these as controls. Otherwise, controls are unperturbed
    reconstructions of the real images nearest to the group, with its labels in the proportion of its failures. There
    are at most `count`, up to rounding. Images that the classifier misclassifies before reconstruction are left out:
    every error among the controls is due to the VAE.
    """
    if (fresh.source != NO_SOURCE).any():
        controls = np.searchsorted(searched.row, fresh.source)
        return int(searched.wrong_on_image[controls].sum()), len(controls)
    wrong, total = 0, 0
    for label, share in group.label_shares().items():
        usable = np.flatnonzero((searched.label == label) & ~searched.wrong_on_image)
        order = np.argsort(group.gaussian.distance_squared(searched.latent[usable]), kind="stable")
        nearest = usable[order[: round(share * count)]]
        wrong, total = wrong + int(searched.wrong_on_reconstruction[nearest].sum()), total + len(nearest)
    return wrong, total


def label_of(latents: Array, group: Group, failures: GroupedFailures) -> Array:
    """Return the true labels (n,) of latents (n, d) drawn from a group.

    In a group with several labels, each latent has the label of the nearest member.
    """
    if len(group.label_shares()) == 1:
        return np.full(len(latents), group.true_label)
    few = group.members[np.linspace(0, len(group.members) - 1, min(len(group.members), _MOST_MEMBERS)).astype(int)]
    nearest = distances(latents, failures.latent[few]).argmin(axis=1)
    return np.asarray(failures.true_label[few][nearest])


def count_real_inside(group: Group, latents: Array, searched: SearchedImages) -> RealImageCounts:
    """Count the searched real images of a group's label that lie inside.

    An image lies inside when it is as near to the mean, in Mahalanobis distance, as 95 % of the group's failures,
    latents (m, d).
    """
    edge = np.quantile(group.gaussian.distance_squared(latents), _INSIDE)
    alike = searched.label == group.true_label
    inside = alike & (group.gaussian.distance_squared(searched.latent) <= edge)
    return RealImageCounts(
        wrong=int(searched.wrong_on_image[inside].sum()), images=int(inside.sum()), of_label=int(alike.sum())
    )


def nearest_images(latents: Array, training: TrainingImages, sd_agg: Array, count: int) -> NearestImages:
    """Return the training images nearest to any of the latents (n, d)."""
    distance = distances(training.latent / sd_agg, latents / sd_agg).min(axis=1)  # (r,)
    first = np.argsort(distance, kind="stable")[:count]
    return NearestImages(
        row=training.row[first],
        label=training.label[first],
        predicted=training.predicted[first],
        distance_sd=distance[first],
    )


def novelty_sd(latents: Array, misclassified: TrainingImages, sd_agg: Array) -> float | None:
    """Return the median distance of latents (n, d) to misclassified training images.

    Each latent counts its nearest one. Returns None when no training image is misclassified.
    """
    if not len(misclassified.row):
        return None
    return float(np.median(distances(latents / sd_agg, misclassified.latent / sd_agg).min(axis=1)))


def suggest_label(
    group: Group, latents: Array, training: TrainingImages, sd_agg: Array, classes: Sequence[str]
) -> tuple[str, str]:
    """Return the suggested label of a group, and the reason.

    It is the label of most training images near the group's exemplars, latents (n, d), or the sources' label when none
    has a majority.
    """
    carried = sum(number for (true, _), number in group.profile if true == group.true_label)
    source = (
        f"{carried} of {len(group.members)} failures are small steps from real images labelled "
        f"{classes[group.true_label]!r}"
    )
    distance = distances(latents / sd_agg, training.latent / sd_agg)
    votes = training.label[np.argsort(distance, axis=1, kind="stable")[:, :_VOTES]]
    (winner, count), *_ = Counter(votes.ravel().tolist()).most_common(1)
    label = winner if 2 * count > votes.size else group.true_label
    agreeing = int((votes == label).sum())
    near = f"{agreeing} of {votes.size} training images nearest to its exemplars are labelled {classes[label]!r}"
    return classes[label], f"{source}; {near}"


def distances(a: Array, b: Array) -> Array:
    """Return the distances (n, m) of a (n, d) and b (m, d), per dimension.

    They are Euclidean distances divided by the square root of d.
    """
    # Centred: far from the origin, differences of large squares lose all digits.
    centre = b.mean(axis=0, dtype=np.float64) if len(b) else 0.0
    a, b = a - centre, b - centre
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0) / a.shape[1]))


# Images of failures and of real images that a region shows.
_EXEMPLARS, _NEAREST = 16, 8


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A group with its test and the evidence from real images."""

    group: Group
    test: ErrorRateTest
    q_value: float
    stability: float
    # Positions of the failures to show, the medoid first.
    exemplars: Array
    real: RealImageCounts
    nearest: NearestImages
    nearest_misclassified: NearestImages
    novelty_sd: float | None
    suggested_label: str
    suggestion_reason: str
    # Share of the sources with failures from which a small step leads into the group.
    source_share: float

    @property
    def score(self) -> float:
        """Return the priority of a fix, in [0, 1].

        It is the excess of the error rate over the controls', times the share of sources.
        """
        return self.test.excess * self.source_share


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """The data from which the findings of a run are made."""

    failures: GroupedFailures
    around: Surroundings
    classes: Sequence[str]


def find_regions(
    groups: Sequence[Group],
    stability: Array,
    known: RunEvidence,
    *,
    errors: Callable[[int, Group], FreshErrors],
    controls: int,
    false_discovery_rate: float,
) -> list[Finding]:
    """Return the groups that are worse than their controls, by descending score.

    `stability` (g,) is that of each group. `errors(number, group)` classifies fresh images of a group. Each group has
    about `controls` controls.
    """
    tests = [_test_group(number, group, known, errors, controls) for number, group in enumerate(groups)]
    found = [
        _make_finding(group, test, float(q), float(stable), known)
        for group, test, q, stable in zip(groups, tests, q_values(tests), stability, strict=True)
        if q <= false_discovery_rate
    ]
    return sorted(found, key=lambda finding: (-finding.score, -len(finding.group.members)))


def _test_group(
    number: int, group: Group, known: RunEvidence, errors: Callable[[int, Group], FreshErrors], most_controls: int
) -> ErrorRateTest:
    fresh = errors(number, group)
    control_errors, control_count = count_controls(group, fresh, known.around.searched, most_controls)
    return ErrorRateTest(
        errors=fresh.errors, decodes=len(fresh.source), control_errors=control_errors, controls=control_count
    )


def _make_finding(group: Group, test: ErrorRateTest, q_value: float, stability: float, known: RunEvidence) -> Finding:
    latent, training, sd_agg = known.failures.latent, known.around.training, known.around.sd_agg
    shown = choose_exemplars(latent, group.independent_members, sd_agg, _EXEMPLARS)
    misclassified = training.misclassified()
    label, reason = suggest_label(group, latent[shown], training, sd_agg, known.classes)
    return Finding(
        group=group,
        test=test,
        q_value=q_value,
        stability=stability,
        exemplars=shown,
        real=count_real_inside(group, latent[group.members], known.around.searched),
        nearest=nearest_images(latent[shown[:1]], training, sd_agg, _NEAREST),
        nearest_misclassified=nearest_images(latent[shown], misclassified, sd_agg, _NEAREST),
        novelty_sd=novelty_sd(latent[shown], misclassified, sd_agg),
        suggested_label=label,
        suggestion_reason=reason,
        source_share=group.source_count / len(np.unique(known.failures.source)),
    )
