"""The regions of a run: groups of its failures that are worse than their controls, with what is known of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.arrays import Array
from services.distiller import evidence
from services.distiller.evidence import Near, RealInside, Surroundings
from services.distiller.grouping import Failures, Group
from services.statistics.intervals import Trial, q_values

# Pictures of failures and of real images that a region carries.
_EXEMPLARS, _NEAREST = 16, 8


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A group with the outcome of its test and what real images say of it."""

    group: Group
    trial: Trial
    q_value: float
    stability: float
    # Positions of failures to show, the medoid first.
    exemplars: Array
    real: RealInside
    nearest: Near
    nearest_misclassified: Near
    novelty_sd: float | None
    suggested_label: str
    suggestion_reason: str

    @property
    def score(self) -> float:
        """Return what a person would fix first: how much more often it is wrong than its controls x typicality."""
        return self.trial.excess * self.real.typicality


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a run knows of its groups."""

    failures: Failures
    around: Surroundings
    classes: Sequence[str]


def find(
    groups: Sequence[Group],
    stability: Array,
    known: Known,
    *,
    errors: Callable[[int, Group], tuple[int, int]],
    controls: int,
    false_discovery_rate: float,
) -> list[Finding]:
    """Return the groups that are worse than their controls, of `controls` at most, the highest score first.

    `errors(number, group)` decodes fresh latents of a group; it returns how many are read wrongly, and how many there
    were.
    """
    trials = [_tried(number, group, known, errors, controls) for number, group in enumerate(groups)]
    found = [
        _found(group, trial, float(q), float(stable), known)
        for group, trial, q, stable in zip(groups, trials, q_values(trials), stability, strict=True)
        if q <= false_discovery_rate
    ]
    return sorted(found, key=lambda finding: (-finding.score, -len(finding.group.members)))


def _tried(
    number: int, group: Group, known: Known, errors: Callable[[int, Group], tuple[int, int]], most_controls: int
) -> Trial:
    wrong, decodes = errors(number, group)
    control_errors, controls = evidence.controls(group, known.around.searched, most_controls)
    return Trial(errors=wrong, decodes=decodes, control_errors=control_errors, controls=controls)


def _found(group: Group, trial: Trial, q_value: float, stability: float, known: Known) -> Finding:
    latent, training, sd_agg = known.failures.latent, known.around.training, known.around.sd_agg
    shown = evidence.exemplars(latent, group.members, sd_agg, _EXEMPLARS)
    misclassified = training.misclassified()
    label, reason = evidence.suggestion(group, latent[shown], training, sd_agg, known.classes)
    return Finding(
        group=group,
        trial=trial,
        q_value=q_value,
        stability=stability,
        exemplars=shown,
        real=evidence.real_inside(group, latent[group.members], known.around.searched),
        nearest=evidence.nearest(latent[shown[:1]], training, sd_agg, _NEAREST),
        nearest_misclassified=evidence.nearest(latent[shown], misclassified, sd_agg, _NEAREST),
        novelty_sd=evidence.novelty_sd(latent[shown], misclassified, sd_agg),
        suggested_label=label,
        suggestion_reason=reason,
    )
