"""The state of a monitor: updates by scored batches, and change detection.

The detector is a Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo, 2024, "E-detectors: a nonparametric framework
for sequential change detection"): `M_t = (M_{t-1} + 1) e_t`, where each `e_t` has a conditional expectation of at most
1 while nothing has changed. Then `M_t - t` is a supermartingale, so that M reaches a threshold only after as many
observations in expectation, whatever their distribution. The same holds for any mean of such detectors. The expected
run length of the configuration is the threshold of an alert.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.v1 import guard_pb2, monitor_pb2, tensor_pb2

from services.arrays import Array

ODDS_RATIOS = np.array([1.5, 2.0, 4.0, 8.0, 20.0])
"""Alternatives of an increased rate, each with a detector of its own."""

RANK_ALTERNATIVES = np.array([-1.2, -0.6, -0.3, 0.3, 0.6, 1.2])
"""Alternatives of a mean rank below or above one half, each with a detector of its own."""

# Upper bound of evidence: infinity could never decrease.
_MAX_EVIDENCE = 1e300
# Normal quantile: confidence that a mean rank under no change deviates from one half by no more than allowed.
_CONFIDENCE_QUANTILE = 2.6


def rate_factors(hits: Array, bound: Array) -> Array:
    """Return e-values (n, k, alternatives) of indicators (n, k).

    Their reference rates (k,) are at most `bound`. The e-values are likelihood ratios
    of Bernoulli variables: their expectation is 1 at the bound, and less at any lower
    rate.
    """
    profile = np.clip(bound, 1e-9, 1 - 1e-9)[:, None]
    odds = profile / (1 - profile) * ODDS_RATIOS
    changed = odds / (1 + odds)  # (k, alternatives)
    return np.asarray(np.where(hits[:, :, None] > 0, changed / profile, (1 - changed) / (1 - profile)))


def rank_factors(ranks: Array, references: int) -> Array:
    """Return e-values (n, 1, alternatives) of ranks (n,) in [0, 1].

    `references` is the number of reference values. Without change the mean rank is one half, up to the sampling error
    of these values.
    """
    slack = _CONFIDENCE_QUANTILE / np.sqrt(12 * max(1, references))
    return np.asarray(1 + RANK_ALTERNATIVES * (ranks[:, None] - 0.5) - np.abs(RANK_ALTERNATIVES) * slack)[:, None, :]


def accumulate_evidence(evidence: Array, factors: Array, applies: Array) -> Array:
    """Return the evidence (n, k, alternatives) after each of n observations.

    It starts from the initial evidence (k, alternatives). Observations with `applies` (n,) False leave the evidence
    unchanged.
    """
    path = np.empty_like(factors)
    for step, factor in enumerate(factors):
        evidence = np.minimum((evidence + 1) * factor, _MAX_EVIDENCE) if applies[step] else evidence
        path[step] = evidence
    return path


Kind = monitor_pb2.Alert
# Shares of the evidence, which sum to 1, so that the run length holds. Traffic that moves into a region also changes
# the predicted classes; the region explains more, and is named unless its evidence is much smaller.
_WEIGHTS = {Kind.KIND_REGION_HITS: 0.8, Kind.KIND_PREDICTION_DRIFT: 0.1, Kind.KIND_LATENT_DRIFT: 0.1}
# Versions that are counted separately; further ones are counted together.
_MOST_VERSIONS, OTHER_VERSIONS = 50, "other"
# A smaller excess recall of a region does not tell how much traffic moved there.
_LEAST_RECALL = 0.1
# After an alert, its subject raises no other within this share of the expected run length.
_QUIET_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """The scores of the n observations of a batch, in their order."""

    # As the distiller stores it: index, inside, typicality, predicted, confidence; (n,) each.
    arrays: Mapping[str, Array]
    # Versions that answered, (n,).
    versions: Sequence[str]

    def part(self, begin: int, end: int) -> "ScoredBatch":
        """Return a slice of the observations."""
        arrays = {name: array[begin:end] for name, array in self.arrays.items()}
        return ScoredBatch(arrays=arrays, versions=self.versions[begin:end])


@dataclass(frozen=True, kw_only=True)
class ReferenceProfile:
    """Statistics of a guard's reference images, as the distiller stores them."""

    guard: guard_pb2.Guard
    classes: Sequence[str]
    arrays: Mapping[str, Array]

    @property
    def images(self) -> int:
        return int(self.arrays["images"][0])

    def ranks(self, typicality: Array) -> Array:
        """Return the ranks (n,) in [0, 1] of values among the references."""
        sorted_ = self.arrays["typicality"]
        below, upto = (np.searchsorted(sorted_, typicality, side=side) for side in ("left", "right"))
        return np.asarray((below + upto) / 2 / len(sorted_))

    def estimate(self, region: int) -> tensor_pb2.Estimate:
        hits = int(self.arrays["hits"][region])
        return tensor_pb2.Estimate(
            value=hits / self.images,
            low=float(self.arrays["hits_low"][region]),
            high=float(self.arrays["hits_high"][region]),
            successes=hits,
            trials=self.images,
        )


def restart(state: monitor_pb2.MonitorState, profile: ReferenceProfile) -> None:
    """Restart a monitor with a guard, in place.

    Silenced subjects stay silenced.
    """
    silent, total, config = dict(state.silent_until), state.total, state.monitor.config
    anew = monitor_pb2.MonitorState(total=total, silent_until=silent)
    anew.monitor.name = f"{names.parent(profile.guard.name)}/monitor"
    anew.monitor.config.CopyFrom(config)
    anew.monitor.guard = profile.guard.name
    anew.since.GetCurrentTime()
    for number, region in enumerate(profile.guard.regions):
        anew.monitor.hits.add(region=region.region, label=region.label, calm_rate=profile.estimate(number))
    anew.region_evidence[:] = [0.0] * (len(profile.guard.regions) * len(ODDS_RATIOS))
    anew.class_evidence[:] = [0.0] * (len(profile.classes) * len(ODDS_RATIOS))
    anew.rank_evidence[:] = [0.0] * len(RANK_ALTERNATIVES)
    anew.predicted[:] = [0] * len(profile.classes)
    state.CopyFrom(anew)


def update_state(
    state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile, *, expected_run_length: float
) -> list[monitor_pb2.Alert]:
    """Apply a batch to a state, in place, and return its alerts.

    A batch causes at most one alert. After an alert the monitor restarts, and the rest of the batch is counted but not
    tested for change.
    """
    paths = _paths(state, seen, profile)
    weighed = np.sum([_WEIGHTS[kind] * path.mean(axis=(1, 2)) for kind, path in paths.items()], axis=0)
    crossing = _threshold_crossing(weighed, expected_run_length)
    count = len(seen.versions) if crossing is None else crossing + 1
    _count(state, seen, profile, count)
    if crossing is None:
        for kind, field in _FIELDS.items():
            getattr(state, field)[:] = paths[kind][-1].ravel().tolist()
        return []
    alert = _alert(state, profile, {kind: path[count - 1] for kind, path in paths.items()})
    alert.evidence = float(weighed[count - 1])
    state.silent_until[_about(alert)] = state.total + round(_QUIET_SHARE * expected_run_length)
    restart(state, profile)
    _count_versions(state, seen.versions[count:])
    state.total += len(seen.versions) - count
    return [alert]


def _threshold_crossing(evidence: Array, expected_run_length: float) -> int | None:
    """Return the position of the first evidence (n,) that reaches the threshold of an alert.

    The threshold is the expected run length of the configuration.
    """
    reached = np.flatnonzero(evidence >= expected_run_length)
    return int(reached[0]) if len(reached) else None


_FIELDS = {
    Kind.KIND_REGION_HITS: "region_evidence",
    Kind.KIND_PREDICTION_DRIFT: "class_evidence",
    Kind.KIND_LATENT_DRIFT: "rank_evidence",
}


def _paths(
    state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile
) -> dict["monitor_pb2.Alert.Kind.ValueType", Array]:
    """Return the evidence (n, k, alternatives) of each kind.

    It is the evidence after each of the n observations.
    """
    index, inside = seen.arrays["index"], seen.arrays["inside"] > 0
    scored, read = index >= 0, seen.arrays["predicted"] >= 0
    in_region = (index[:, None] == np.arange(len(profile.guard.regions))) & inside[:, None]
    of_class = seen.arrays["predicted"][:, None] == np.arange(len(profile.classes))
    ranks = profile.ranks(np.nan_to_num(seen.arrays["typicality"]))
    factors_by_kind = {
        Kind.KIND_REGION_HITS: (rate_factors(in_region, profile.arrays["hits_bound"]), scored),
        Kind.KIND_PREDICTION_DRIFT: (rate_factors(of_class, profile.arrays["predicted_bound"]), read),
        Kind.KIND_LATENT_DRIFT: (rank_factors(ranks, profile.images), scored),
    }
    return {
        kind: accumulate_evidence(
            np.array(getattr(state, _FIELDS[kind])).reshape(factors.shape[1:]),
            factors * _unsilenced(state, kind, profile)[:, None],
            of_which,
        )
        for kind, (factors, of_which) in factors_by_kind.items()
    }


def _unsilenced(
    state: monitor_pb2.MonitorState, kind: "monitor_pb2.Alert.Kind.ValueType", profile: ReferenceProfile
) -> Array:
    """Return 1 for subjects (k,) that may raise alerts, else 0."""
    silent = [state.silent_until.get(f"{kind} {subject}", 0) > state.total for subject in _subjects(kind, profile)]
    return 1.0 - np.array(silent)


def _subjects(kind: "monitor_pb2.Alert.Kind.ValueType", profile: ReferenceProfile) -> list[str]:
    if kind == Kind.KIND_REGION_HITS:
        return [region.region for region in profile.guard.regions]
    return list(profile.classes) if kind == Kind.KIND_PREDICTION_DRIFT else [""]


def _about(alert: monitor_pb2.Alert) -> str:
    return f"{alert.kind} {alert.subject}"


def _count(state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile, count: int) -> None:
    """Count the first `count` observations of a batch in the state."""
    arrays = {name: array[:count] for name, array in seen.arrays.items()}
    state.total += count
    state.monitor.observations += count
    _count_versions(state, seen.versions[:count])
    for row in np.flatnonzero(arrays["inside"]).tolist():
        hits = state.monitor.hits[int(arrays["index"][row])]
        hits.hits += 1
        hits.versions[_counted_version(hits.versions, seen.versions[row])] += 1
    read = arrays["predicted"] >= 0
    classes = np.bincount(arrays["predicted"][read], minlength=len(profile.classes))
    state.predicted[:] = (np.array(state.predicted) + classes).tolist()
    outside = read & (arrays["inside"] == 0)
    state.outside += int(outside.sum())
    state.confident += int((arrays["confidence"][outside] > profile.arrays["confidence"][0]).sum())
    ranks = profile.ranks(arrays["typicality"][arrays["index"] >= 0])
    state.ranked += len(ranks)
    state.rank_sum += float(ranks.sum())
    _update_rates(state, profile)


def _count_versions(state: monitor_pb2.MonitorState, versions: Sequence[str]) -> None:
    for version, number in Counter(versions).items():
        state.monitor.versions[_counted_version(state.monitor.versions, version)] += number


def _counted_version(counts: Mapping[str, int], version: str) -> str:
    """Return the name under which a version is counted.

    Reporters choose the names of versions, so their number is bounded.
    """
    return version if version in counts or len(counts) < _MOST_VERSIONS else OTHER_VERSIONS


def _update_rates(state: monitor_pb2.MonitorState, profile: ReferenceProfile) -> None:
    """Update the monitor's rates from the counts."""
    monitor, predicted = state.monitor, np.array(state.predicted)
    if total := predicted.sum():
        reference = profile.arrays["predicted"] / profile.images
        monitor.prediction_drift = float(np.abs(predicted / total - reference).sum() / 2)
    if state.outside:
        monitor.estimated_accuracy = _estimated_accuracy(state, profile)
    if state.ranked:
        monitor.latent_drift = 2 * state.rank_sum / state.ranked - 1
    monitor.update_time.GetCurrentTime()


def _estimated_accuracy(state: monitor_pb2.MonitorState, profile: ReferenceProfile) -> float:
    """Return the accuracy, estimated without ground truth.

    Outside the regions, accuracy follows from confidence. The share of traffic that moved into a region is its hits
    beyond the reference rate, divided by the guard's recall; it is misclassified at the region's error rate.
    """
    usual = state.confident / state.outside
    if set(state.monitor.versions) != {str(profile.arrays["searched_version"][0])}:
        return usual
    hits = np.array([one.hits for one in state.monitor.hits]) / state.monitor.observations
    at_rest = profile.arrays["hits"] / profile.images
    moved = np.clip((hits - at_rest) / np.maximum(profile.arrays["recall"][0] - at_rest, _LEAST_RECALL), 0, 1)
    moved = moved / max(1.0, float(moved.sum()))
    return float((1 - moved.sum()) * usual + (moved * (1 - profile.arrays["error_rate"])).sum())


def _alert(
    state: monitor_pb2.MonitorState,
    profile: ReferenceProfile,
    evidence: Mapping["monitor_pb2.Alert.Kind.ValueType", Array],
) -> monitor_pb2.Alert:
    """Return the alert about the subject with most evidence over all kinds.

    The evidence of each kind is an array (k, alternatives).
    """
    shares = {kind: _WEIGHTS[kind] * of.sum(axis=1) / of.size for kind, of in evidence.items()}
    kind = max(shares, key=lambda one: float(shares[one].max()))
    number = int(shares[kind].argmax())
    alert = monitor_pb2.Alert(
        kind=kind, subject=_subjects(kind, profile)[number], observations=state.monitor.observations
    )
    alert.since.CopyFrom(state.since)
    if kind == Kind.KIND_REGION_HITS:
        hits = state.monitor.hits[number]
        alert.calm, alert.now = hits.calm_rate.value, hits.hits / state.monitor.observations
        where = f"region {names.last(hits.region)} of run {names.last(names.parent(hits.region))} ({hits.label})"
        alert.summary = f"{alert.now:.3g} of the images fall in {where}, {alert.calm:.3g} in reference traffic"
    elif kind == Kind.KIND_PREDICTION_DRIFT:
        alert.calm = float(profile.arrays["predicted"][number] / profile.images)
        alert.now = state.predicted[number] / max(1, sum(state.predicted))
        alert.summary = (
            f"{alert.subject!r} is predicted for {alert.now:.3g} of the images, {alert.calm:.3g} in reference traffic"
        )
    else:
        alert.calm, alert.now = 0.5, (1 + state.monitor.latent_drift) / 2
        word = "less" if alert.now < alert.calm else "more"
        alert.summary = f"images are {word} usual than reference images: mean rank {alert.now:.3g} instead of 0.5"
    return alert
