"""The state of a monitor: a fold over scored batches, with sequential change detection."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.v1 import guard_pb2, monitor_pb2, tensor_pb2

from services.arrays import Array

ODDS_RATIOS = np.array([1.5, 2.0, 4.0, 8.0, 20.0])
"""How much larger a rate may have become: alternatives, each with a detector of its own."""

STAKES = np.array([-1.2, -0.6, -0.3, 0.3, 0.6, 1.2])
"""What is bet on a mean rank above or below one half: alternatives again."""

# Evidence is not counted beyond this: of infinity nothing comes back.
_MOST = 1e300
# Quantile of the normal distribution: how sure it is that a mean rank in calm is as near to one half as is allowed for.
_SURE = 2.6


def rate_factors(hits: Array, bound: Array) -> Array:
    """Return e-values (n, k, alternatives) of observations (n, k), 0 or 1, whose calm rates (k,) are at most `bound`.

    Likelihood ratios of Bernoulli variables: at the bound their expectation is 1, at any rate below it less.
    """
    profile = np.clip(bound, 1e-9, 1 - 1e-9)[:, None]
    odds = profile / (1 - profile) * ODDS_RATIOS
    changed = odds / (1 + odds)  # (k, alternatives)
    return np.asarray(np.where(hits[:, :, None] > 0, changed / profile, (1 - changed) / (1 - profile)))


def rank_factors(ranks: Array, references: int) -> Array:
    """Return e-values (n, 1, alternatives) of ranks (n,), in [0, 1], among so many reference values.

    In calm their mean is one half, up to what the choice of the references makes of it.
    """
    slack = _SURE / np.sqrt(12 * max(1, references))
    return np.asarray(1 + STAKES * (ranks[:, None] - 0.5) - np.abs(STAKES) * slack)[:, None, :]


def accumulated(evidence: Array, factors: Array, told: Array) -> Array:
    """Return the evidence (n, k, alternatives) after each of n observations, from that before the first (k, a).

    An observation that nothing is `told` of, (n,), changes nothing.
    """
    path = np.empty_like(factors)
    for step, factor in enumerate(factors):
        evidence = np.minimum((evidence + 1) * factor, _MOST) if told[step] else evidence
        path[step] = evidence
    return path


Kind = monitor_pb2.Alert
# Shares of the evidence. They add up to 1, so the run length holds. What moves into a region changes the predicted
# classes, too: of both the region says why, and is named unless there is much less evidence for it.
_WEIGHTS = {Kind.KIND_REGION_HITS: 0.8, Kind.KIND_PREDICTION_DRIFT: 0.1, Kind.KIND_LATENT_DRIFT: 0.1}
# Versions that are told apart; what answers beyond these is counted together.
_MOST_VERSIONS, OTHER_VERSIONS = 50, "other"
# Less than this of a region, found beyond calm, tells nothing of how much moved there.
_LEAST_RECALL = 0.1
# What an alert was raised about raises no other within so large a part of the expected run length.
_SILENCE = 0.1


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """What was seen of the n observations of a batch, in their order."""

    # As the distiller stores it: index, inside, typicality, predicted, confidence, (n,) each.
    arrays: Mapping[str, Array]
    # Versions that answered, (n,).
    versions: Sequence[str]

    def part(self, begin: int, end: int) -> "ScoredBatch":
        """Return some of the observations."""
        arrays = {name: array[begin:end] for name, array in self.arrays.items()}
        return ScoredBatch(arrays=arrays, versions=self.versions[begin:end])


@dataclass(frozen=True, kw_only=True)
class ReferenceProfile:
    """What a guard's reference images look like, as the distiller stores it, and the names of what they are told by."""

    guard: guard_pb2.Guard
    classes: Sequence[str]
    arrays: Mapping[str, Array]

    @property
    def images(self) -> int:
        return int(self.arrays["images"][0])

    def ranks(self, typicality: Array) -> Array:
        """Return the ranks (n,), in [0, 1], of values among the references."""
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
    """Let a monitor begin anew with a guard, in place; what it is silent about it stays silent about."""
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
    anew.rank_evidence[:] = [0.0] * len(STAKES)
    anew.predicted[:] = [0] * len(profile.classes)
    state.CopyFrom(anew)


def fold(
    state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile, *, expected_run_length: float
) -> list[monitor_pb2.Alert]:
    """Change a state by a batch, in place; return the alert that it gives cause to, if any.

    With an alert the monitor begins anew; the rest of the batch is not looked at for change.
    """
    paths = _paths(state, seen, profile)
    weighed = np.sum([_WEIGHTS[kind] * path.mean(axis=(1, 2)) for kind, path in paths.items()], axis=0)
    reached = np.flatnonzero(weighed >= expected_run_length)
    count = int(reached[0]) + 1 if len(reached) else len(seen.versions)
    _count(state, seen, profile, count)
    if not len(reached):
        for kind, field in _FIELDS.items():
            getattr(state, field)[:] = paths[kind][-1].ravel().tolist()
        return []
    alert = _alert(state, profile, {kind: path[count - 1] for kind, path in paths.items()})
    alert.evidence = float(weighed[count - 1])
    state.silent_until[_about(alert)] = state.total + round(_SILENCE * expected_run_length)
    restart(state, profile)
    _count_versions(state, seen.versions[count:])
    state.total += len(seen.versions) - count
    return [alert]


_FIELDS = {
    Kind.KIND_REGION_HITS: "region_evidence",
    Kind.KIND_PREDICTION_DRIFT: "class_evidence",
    Kind.KIND_LATENT_DRIFT: "rank_evidence",
}


def _paths(
    state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile
) -> dict["monitor_pb2.Alert.Kind.ValueType", Array]:
    """Return the evidence after each observation, (n, k, alternatives) for each kind."""
    index, inside = seen.arrays["index"], seen.arrays["inside"] > 0
    looked_at, read = index >= 0, seen.arrays["predicted"] >= 0
    in_region = (index[:, None] == np.arange(len(profile.guard.regions))) & inside[:, None]
    of_class = seen.arrays["predicted"][:, None] == np.arange(len(profile.classes))
    ranks = profile.ranks(np.nan_to_num(seen.arrays["typicality"]))
    told = {
        Kind.KIND_REGION_HITS: (rate_factors(in_region, profile.arrays["hits_bound"]), looked_at),
        Kind.KIND_PREDICTION_DRIFT: (rate_factors(of_class, profile.arrays["predicted_bound"]), read),
        Kind.KIND_LATENT_DRIFT: (rank_factors(ranks, profile.images), looked_at),
    }
    return {
        kind: accumulated(
            np.array(getattr(state, _FIELDS[kind])).reshape(factors.shape[1:]),
            factors * _heard(state, kind, profile)[:, None],
            of_which,
        )
        for kind, (factors, of_which) in told.items()
    }


def _heard(
    state: monitor_pb2.MonitorState, kind: "monitor_pb2.Alert.Kind.ValueType", profile: ReferenceProfile
) -> Array:
    """Return 1 for what may raise an alert, 0 for what the monitor is silent about, (k,)."""
    silent = [state.silent_until.get(f"{kind} {subject}", 0) > state.total for subject in _subjects(kind, profile)]
    return 1.0 - np.array(silent)


def _subjects(kind: "monitor_pb2.Alert.Kind.ValueType", profile: ReferenceProfile) -> list[str]:
    if kind == Kind.KIND_REGION_HITS:
        return [region.region for region in profile.guard.regions]
    return list(profile.classes) if kind == Kind.KIND_PREDICTION_DRIFT else [""]


def _about(alert: monitor_pb2.Alert) -> str:
    return f"{alert.kind} {alert.subject}"


def _count(state: monitor_pb2.MonitorState, seen: ScoredBatch, profile: ReferenceProfile, count: int) -> None:
    """Count the first observations of a batch."""
    arrays = {name: array[:count] for name, array in seen.arrays.items()}
    state.total += count
    state.monitor.observations += count
    _count_versions(state, seen.versions[:count])
    for row in np.flatnonzero(arrays["inside"]).tolist():
        hits = state.monitor.hits[int(arrays["index"][row])]
        hits.hits += 1
        hits.versions[_told_apart(hits.versions, seen.versions[row])] += 1
    read = arrays["predicted"] >= 0
    classes = np.bincount(arrays["predicted"][read], minlength=len(profile.classes))
    state.predicted[:] = (np.array(state.predicted) + classes).tolist()
    outside = read & (arrays["inside"] == 0)
    state.outside += int(outside.sum())
    state.confident += int((arrays["confidence"][outside] > profile.arrays["confidence"][0]).sum())
    ranks = profile.ranks(arrays["typicality"][arrays["index"] >= 0])
    state.ranked += len(ranks)
    state.rank_sum += float(ranks.sum())
    _tell(state, profile)


def _count_versions(state: monitor_pb2.MonitorState, versions: Sequence[str]) -> None:
    for version, number in Counter(versions).items():
        state.monitor.versions[_told_apart(state.monitor.versions, version)] += number


def _told_apart(counts: Mapping[str, int], version: str) -> str:
    """Return under which name a version is counted: whoever reports names it, and there are only so many."""
    return version if version in counts or len(counts) < _MOST_VERSIONS else OTHER_VERSIONS


def _tell(state: monitor_pb2.MonitorState, profile: ReferenceProfile) -> None:
    """Say what the counts come to."""
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
    """Return the share that is read correctly, as far as it can be told without truth.

    Outside of the regions by confidence. More hits than in calm, over the share of a region that the guard finds, moved
    there, and are misread as the searched version misreads the region.
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
    """Return the alert about what has most of the evidence (k, alternatives) of all kinds."""
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
        alert.summary = f"{alert.now:.3g} of the images fall in {where}, {alert.calm:.3g} in calm"
    elif kind == Kind.KIND_PREDICTION_DRIFT:
        alert.calm = float(profile.arrays["predicted"][number] / profile.images)
        alert.now = state.predicted[number] / max(1, sum(state.predicted))
        alert.summary = f"{alert.subject!r} is predicted for {alert.now:.3g} of the images, {alert.calm:.3g} in calm"
    else:
        alert.calm, alert.now = 0.5, (1 + state.monitor.latent_drift) / 2
        word = "less" if alert.now < alert.calm else "more"
        alert.summary = f"images are {word} usual than in calm: mean rank {alert.now:.3g} instead of 0.5"
    return alert
