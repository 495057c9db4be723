"""Validity: whether a perturbation still shows its label.

A VAE blurs, and a step can cross a true class boundary: an unreadable decoded image is no failure of the classifier.
The signals of validity need no person, and their thresholds can be fitted to annotations. The signals come from
labelled training images alone; none of them uses the classifier under test.

Fitting is greedy: each step moves the threshold that most increases the share of rejected invalid failures minus that
of valid ones. Regions count equally, whatever their size: failures of one region are not independent evidence.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from services.arrays import Array
from services.generator.codec import SD_FLOOR
from services.statistics.gaussian import shrunk_covariance

# Arrays on the host, or tensors of one device.
A = TypeVar("A", Array, Tensor)
NEIGHBOURS = 10
# Training images behind typicality and neighbour agreement, drawn by seed: bounds memory and time.
MAX_REFERENCES = 20_000
# Latents of one block of a neighbour search, whose distances are block x MAX_REFERENCES numbers.
_BLOCK = 512
# Least variance of a density, in squared aggregate sds: coplanar points would have none.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The bounds of a valid perturbation; `ValidityConfig` in the contract."""

    max_radius_sd: float
    min_typicality: float
    min_label_probability: float
    min_neighbour_agreement: float
    max_round_trip_sd: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The r labelled training images in latent space.

    It also has a Gaussian of the aggregate posterior for each class.
    """

    # (r, d) posterior means in aggregate latent sds
    latent: Array
    # (r,) class ids
    label: Array
    # (r,) rows of the training split
    row: Array
    # (r,) log densities of these latents under the aggregate posterior, ascending
    log_density: Array
    # (c,) log shares of the classes that have images
    log_share: Array
    # (c, d)
    mean: Array
    # (c, d, d) inverses of the lower Cholesky factors of the covariances
    whitening: Array
    # (d,)
    sd_agg: Array

    @classmethod
    def of(cls, mu: Array, sigma: Array, label: Array, sd_agg: Array, *, row: Array) -> "Reference":
        """Return the reference of training images at rows (r,).

        They have posteriors mu, sigma (r, d) and labels (r,).
        """
        x, noise = (mu / sd_agg).astype(np.float64), (sigma / sd_agg).astype(np.float64)
        classes = np.unique(label)
        # In a dead dimension a VAE's posterior is the prior, which is assumed for a user's pair without sigma, too.
        least = np.where(sd_agg <= SD_FLOOR, SD_FLOOR**-2, _LEAST_VARIANCE)
        pooled = _covariance(x, noise, least)
        shares = np.array([(label == name).mean() for name in classes])
        parts = [_posterior(x[label == name], noise[label == name], least, pooled) for name in classes]
        described = {
            "log_share": np.log(shares),
            "mean": np.stack([mean for mean, _ in parts]),
            "whitening": np.stack([np.linalg.inv(np.linalg.cholesky(covariance)) for _, covariance in parts]),
            "sd_agg": sd_agg,
        }
        density = np.sort(_log_density(x, described["log_share"], described["mean"], described["whitening"]))
        return cls(latent=x.astype(np.float32), label=label, row=row, log_density=density, **described)

    def arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def typicality(self, z: Array) -> Array:
        """Return the typicality (n,) of each latent z (n, d).

        It is the share of training images that are less typical.
        """
        density = _log_density(z / self.sd_agg, self.log_share, self.mean, self.whitening)
        return np.asarray(np.searchsorted(self.log_density, density) / len(self.log_density))

    def neighbour_agreement(self, z: Array, label: Array, device: torch.device) -> Array:
        """Return the neighbour agreement (n,) of each latent z (n, d).

        It is the share of the latent's nearest training images that carry its label (n,).
        """
        if not len(z):
            return np.zeros(0)
        centre, centred = self._centred
        reference = torch.from_numpy(centred).to(device)  # (r, d)
        squares, count = (reference**2).sum(dim=1), min(NEIGHBOURS, len(reference))
        agreement = []
        for begin in range(0, len(z), _BLOCK):
            x = torch.from_numpy((z[begin : begin + _BLOCK] / self.sd_agg - centre).astype(np.float32)).to(device)
            # Largest first: the negative squared distance, up to a constant of each latent.
            nearest = (2 * x @ reference.T - squares).topk(count, dim=1).indices.cpu().numpy()  # (b, count)
            agreement.append((self.label[nearest] == label[begin : begin + _BLOCK, None]).mean(axis=1))
        return np.concatenate(agreement)

    @functools.cached_property
    def _centred(self) -> tuple[Array, Array]:
        """Return the references' mean (d,) and the centred references."""
        # Far from the origin, float32 cannot resolve distances.
        centre = self.latent.mean(axis=0, dtype=np.float64)
        return centre, (self.latent - centre).astype(np.float32)


def radius_sd(z: A, mu: A, sd_agg: A) -> A:
    """Return the radius (n,) of the step from mu to z (n, d).

    It is `norm((z - mu) / sd_agg) / sqrt(d)`.
    """
    # A dead latent dimension has no scale, and no step was made along it.
    scale = sd_agg + (sd_agg == 0)
    radius: A = (((z - mu) / scale) ** 2).mean(1) ** 0.5
    return radius


@dataclass(frozen=True, kw_only=True)
class ValidityCheck:
    """A check of one signal: its measurement, and the values that pass."""

    # Field of the failure that records the value.
    field: str
    measure: Callable[[Any], Array]
    passes: Callable[[Array], Array]


def latent_checks(
    thresholds: Thresholds,
    *,
    reference: Reference,
    label_probability: Callable[[Array, Array], Array] | None,
    device: torch.device,
) -> list[ValidityCheck]:
    """Return the checks that need a candidate's latent only, cheap ones first.

    `label_probability` is None when the label model reads images.
    """
    by_label_model = []
    if label_probability is not None:
        check = ValidityCheck(
            field="label_probability",
            measure=lambda c: label_probability(c.latent, c.true_label),
            passes=lambda v: v >= thresholds.min_label_probability,
        )
        by_label_model.append(check)
    return [
        ValidityCheck(field="radius_sd", measure=lambda c: c.radius_sd, passes=lambda v: v <= thresholds.max_radius_sd),
        *by_label_model,
        ValidityCheck(
            field="typicality",
            measure=lambda c: reference.typicality(c.latent),
            passes=lambda v: v >= thresholds.min_typicality,
        ),
        ValidityCheck(
            field="neighbour_agreement",
            measure=lambda c: reference.neighbour_agreement(c.latent, c.true_label, device),
            passes=lambda v: v >= thresholds.min_neighbour_agreement,
        ),
    ]


def _posterior(x: Array, noise: Array, least: Array, pooled: Array) -> tuple[Array, Array]:
    """Return mean and covariance of one class's posteriors.

    The covariance is shrunk towards the pooled one.
    """
    return x.mean(axis=0), shrunk_covariance(len(x) * _covariance(x, noise, least), len(x), pooled)


def _covariance(x: Array, noise: Array, least: Array) -> Array:
    """Return the covariance (d, d) of posteriors.

    They have means x and sds `noise` (n, d). A least variance (d,) is added.
    """
    return np.asarray(np.cov(x.T, bias=True).reshape(x.shape[1], -1) + np.diag((noise**2).mean(axis=0) + least))


def _log_density(x: Array, log_share: Array, mean: Array, whitening: Array) -> Array:
    """Return the log density (n,) of x (n, d) under the classes' mixture.

    A constant is left out.
    """
    parts = []
    for share, centre, root in zip(log_share, mean, whitening, strict=True):
        distance = (((x - centre) @ root.T) ** 2).sum(axis=1)  # (n,)
        parts.append(share + np.log(np.diagonal(root)).sum() - 0.5 * distance)
    return np.asarray(logsumexp(np.stack(parts, axis=1), axis=1))  # (n, c) -> (n,)


# Largest share of the valid failures that all thresholds together may reject.
_MOST_LOST = 0.1
# A smaller gain of a step may be due to chance.
_LEAST_GAIN = 0.01
# Rounding error of sums of shares.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A field of failures, with its threshold as lower or upper bound."""

    field: str
    threshold: str
    at_least: bool


SIGNALS = (
    Signal(field="label_probability", threshold="min_label_probability", at_least=True),
    Signal(field="neighbour_agreement", threshold="min_neighbour_agreement", at_least=True),
    Signal(field="typicality", threshold="min_typicality", at_least=True),
    Signal(field="round_trip_sd", threshold="max_round_trip_sd", at_least=False),
    Signal(field="radius_sd", threshold="max_radius_sd", at_least=False),
)


@dataclass(frozen=True, kw_only=True)
class FittedThresholds:
    """Fitted thresholds, with the shares of failures that they reject.

    The shares are of invalid and of valid failures, and weighted.
    """

    thresholds: Thresholds
    invalid_rejected: float
    valid_rejected: float


@dataclass(frozen=True, kw_only=True)
class _Move:
    signal: Signal
    value: float
    gain: float


@dataclass(frozen=True, kw_only=True)
class _JudgedFailures:
    """The m annotated failures by signal, and their weights (m,).

    The weights of invalid failures sum to 1, and so do those of valid ones.
    """

    values: Mapping[str, Array]
    invalid: Array
    valid: Array

    def move(self, signal: Signal, kept: Array) -> _Move | None:
        """Return the best move of one threshold, or None.

        The other thresholds keep the failures in `kept` (m,).
        """
        rows = np.flatnonzero(kept)
        # Sorted so that rejected failures come first, for either kind of bound.
        strictness = self.values[signal.field][rows] * (1.0 if signal.at_least else -1.0)
        order = np.argsort(strictness, kind="stable")
        rows, strictness = rows[order], strictness[order]
        lost = self.valid[~kept].sum() + self.valid[rows].cumsum()
        # A threshold lies between two values.
        ends = np.flatnonzero((np.diff(strictness) > 0) & (lost[:-1] <= _MOST_LOST + _ROUNDING))
        if not len(ends):
            return None
        gain = (self.invalid[rows] - self.valid[rows]).cumsum()[ends]
        best = ends[gain.argmax()]
        value = abs(strictness[best] + strictness[best + 1]) / 2
        return _Move(signal=signal, value=float(value), gain=float(gain.max()))


def fit_thresholds(
    invalid: Sequence[Mapping[str, Array]], valid: Sequence[Mapping[str, Array]], had: Thresholds
) -> FittedThresholds:
    """Return fitted thresholds, and the shares that they would have rejected.

    No threshold is looser than the search's. Regions are given by the signals of their failures, (m,) each. There is at
    least one region of either kind.
    """
    judged, thresholds = _together(invalid, valid), had
    kept = np.ones(len(judged.valid), bool)
    while move := _best(judged, kept):
        thresholds = _moved(thresholds, move)
        kept &= _passing(judged.values[move.signal.field], move)
    return FittedThresholds(
        thresholds=thresholds,
        invalid_rejected=float(judged.invalid[~kept].sum()),
        valid_rejected=float(judged.valid[~kept].sum()),
    )


def _together(invalid: Sequence[Mapping[str, Array]], valid: Sequence[Mapping[str, Array]]) -> _JudgedFailures:
    fields = [signal.field for signal in SIGNALS]
    sizes = [len(region[fields[0]]) for region in (*invalid, *valid)]
    shares = np.repeat(1 / np.array(sizes), sizes)
    is_invalid = np.arange(len(shares)) < sum(sizes[: len(invalid)])
    return _JudgedFailures(
        # Double precision always has a value between two stored single-precision values.
        values={name: np.concatenate([region[name] for region in (*invalid, *valid)]).astype(float) for name in fields},
        invalid=np.where(is_invalid, shares / len(invalid), 0.0),
        valid=np.where(is_invalid, 0.0, shares / len(valid)),
    )


def _best(judged: _JudgedFailures, kept: Array) -> _Move | None:
    moves = [move for signal in SIGNALS if (move := judged.move(signal, kept)) and move.gain >= _LEAST_GAIN]
    return max(moves, key=lambda move: move.gain, default=None)


def _moved(thresholds: Thresholds, move: _Move) -> Thresholds:
    """Return the thresholds after a move.

    A threshold that rounding would loosen stays as it is.
    """
    name, before = move.signal.threshold, getattr(thresholds, move.signal.threshold)
    stricter = max if move.signal.at_least else min
    return replace(thresholds, **{name: stricter(before, move.value)})


def _passing(values: Array, move: _Move) -> Array:
    return values >= move.value if move.signal.at_least else values <= move.value
