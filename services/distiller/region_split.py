"""The split of a mixed region into parts, along a line.

In all latent dimensions, a region of a few hundred failures falls into arbitrary pieces once components are expected to
be narrower than the region. The split therefore uses a line, on which components are expected to be narrow. One
candidate is the direction of largest spread, along which two groups separate. The other is the classifier's margin,
which separates failures at the border of two classes from others when there is one group. The line with the more stable
parts is used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from services.arrays import Array
from services.distiller.grouping import (
    GroupedFailures,
    Grouping,
    GroupingConfig,
    group_failures,
    make_group,
    prior_covariance,
    stability_of,
)
from services.statistics.gaussian import center_by_label

# Expected widths of components as shares of the region's width, coarsest parts first.
_WIDTHS = (1, 1 / 2, 1 / 3, 1 / 4)
# A part has this share of its region's sources, when that is below the support of a region, and at least two.
_LEAST_SHARE, _LEAST_SUPPORT = 1 / 4, 2
# Less stable parts, on average, are cut by chance: one Gaussian cloud is sometimes cut so.
_LEAST_STABILITY = 0.5


@dataclass(frozen=True, kw_only=True)
class RegionSplit:
    """The parts of a region as groups, with the stability of each."""

    grouping: Grouping
    stability: Array


def split_group(
    failures: GroupedFailures,
    held_out: Array,
    margin: Array,
    config: GroupingConfig,
    *,
    bootstraps: int,
    check: Callable[[], None] = lambda: None,
) -> RegionSplit | None:
    """Return two or more parts of a region's failures with enough support.

    Returns None when no stable parts are found. Failures with `held_out` (m,) are assigned but not fitted. `margin`
    (m,) is the logit of the true class minus the largest other one, and `config` is the run's. `check` may raise to
    stop.
    """
    usable = np.flatnonzero(held_out == 0)
    lines = (_line_positions(failures, usable, config.sd_agg), margin)
    candidates = [_parts_on_line(position, failures, held_out, config, bootstraps, check) for position in lines]
    stable = [one for one in candidates if one and one.stability.mean() >= _LEAST_STABILITY]
    if not stable:
        return None
    best = max(stable, key=lambda one: one.stability.mean())
    return replace(best, grouping=_in_latents(best.grouping, failures, config.sd_agg))


def _parts_on_line(
    position: Array,
    failures: GroupedFailures,
    held_out: Array,
    config: GroupingConfig,
    bootstraps: int,
    check: Callable[[], None],
) -> RegionSplit | None:
    """Return the coarsest parts of positions (m,) on a line.

    Returns None when the line shows fewer than two parts.
    """
    usable = np.flatnonzero(held_out == 0)
    line = replace(_own_classes(failures), latent=(position / (position[usable].std() or 1.0))[:, None])
    for narrow in _finer_configs(config, line, len(np.unique(failures.source[usable]))):
        found = group_failures(line, held_out, narrow, check)
        if len(found.groups) > 1:
            stable = stability_of(found, line, held_out, narrow, bootstraps=bootstraps, check=check)
            return RegionSplit(grouping=found, stability=stable)
    return None


def _line_positions(failures: GroupedFailures, usable: Array, sd_agg: Array) -> Array:
    """Return the positions (m,) of failures along a line.

    The line is the direction of largest spread within confusions.
    """
    fitted = failures.take(usable)
    residuals = fitted.take(fitted.independent_rows()).residuals() / sd_agg
    direction = np.linalg.svd(residuals, full_matrices=False)[2][0]  # (d,)
    return np.asarray(failures.latent / sd_agg @ direction)


def _own_classes(failures: GroupedFailures) -> GroupedFailures:
    """Return the failures with class ids renumbered among the classes that occur."""
    _, true = np.unique(failures.true_label, return_inverse=True)
    _, predicted = np.unique(failures.predicted_label, return_inverse=True)
    return replace(failures, true_label=true, predicted_label=predicted)


def _finer_configs(config: GroupingConfig, line: GroupedFailures, sources: int) -> Iterator[GroupingConfig]:
    """Yield grouping configurations with ever narrower components.

    Each part has one confusion, even when the run's mixture is plain.
    """
    for width in _WIDTHS:
        yield replace(
            config,
            kind="error_aware",
            classes=1 + int(max(line.true_label.max(), line.predicted_label.max())),
            component_width=width,
            min_support=max(_LEAST_SUPPORT, min(config.min_support, int(_LEAST_SHARE * sources))),
            sd_agg=np.ones(1),
        )


def _in_latents(found: Grouping, failures: GroupedFailures, sd_agg: Array) -> Grouping:
    """Return the same groups with Gaussians in latent space.

    The Gaussians are shrunk towards the covariance around the groups' means.
    """
    together = np.concatenate([part.members for part in found.groups])
    label = np.repeat(np.arange(len(found.groups)), [len(part.members) for part in found.groups])
    prior = prior_covariance(center_by_label(failures.latent[together], label), sd_agg)
    parts = [make_group(failures, part.members, part.held_out_members, prior) for part in found.groups]
    return replace(found, groups=parts)
