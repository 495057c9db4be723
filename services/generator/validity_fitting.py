"""Validity thresholds from what people said of regions: those that part invalid from valid failures best.

Greedy: each step moves the one threshold whose move raises most the share of invalid failures rejected minus the share
of valid ones. A region counts as much as any other, whatever its size: its failures are no independent evidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.arrays import Array
from services.generator.validity import Thresholds

# Of the valid failures, the share that all thresholds together may reject.
_MOST_LOST = 0.1
# A step that gains less follows chance.
_LEAST_GAIN = 0.01
# Of sums of shares.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A field of failures, the threshold that it is held against, and whether it is a least value or a largest one."""

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
    """Thresholds, and the shares of invalid and of valid failures that they would have rejected, regions alike."""

    thresholds: Thresholds
    invalid_rejected: float
    valid_rejected: float


@dataclass(frozen=True, kw_only=True)
class _Move:
    signal: Signal
    value: float
    gain: float


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """All failures, m of them, by the field of each signal, and their shares (m,) of the regions of their kind.

    Weights of invalid ones add up to 1, and so do those of valid ones.
    """

    values: Mapping[str, Array]
    invalid: Array
    valid: Array

    def move(self, signal: Signal, kept: Array) -> _Move | None:
        """Return the best move of one threshold, given which failures (m,) the others keep."""
        rows = np.flatnonzero(kept)
        # Those that a threshold rejects come first, whichever way it goes.
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
    """Return thresholds, none looser than those that failures were found with, and what they would have rejected.

    Regions are given by the signals of their failures, (m,) each, one region or more of either kind.
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


def _together(invalid: Sequence[Mapping[str, Array]], valid: Sequence[Mapping[str, Array]]) -> _Judged:
    fields = [signal.field for signal in SIGNALS]
    sizes = [len(region[fields[0]]) for region in (*invalid, *valid)]
    shares = np.repeat(1 / np.array(sizes), sizes)
    is_invalid = np.arange(len(shares)) < sum(sizes[: len(invalid)])
    return _Judged(
        # In double precision there is always a value between two that are stored in single.
        values={name: np.concatenate([region[name] for region in (*invalid, *valid)]).astype(float) for name in fields},
        invalid=np.where(is_invalid, shares / len(invalid), 0.0),
        valid=np.where(is_invalid, 0.0, shares / len(valid)),
    )


def _best(judged: _Judged, kept: Array) -> _Move | None:
    moves = [move for signal in SIGNALS if (move := judged.move(signal, kept)) and move.gain >= _LEAST_GAIN]
    return max(moves, key=lambda move: move.gain, default=None)


def _moved(thresholds: Thresholds, move: _Move) -> Thresholds:
    """Return the thresholds after a move; one that rounding made looser stays as it was."""
    name, before = move.signal.threshold, getattr(thresholds, move.signal.threshold)
    stricter = max if move.signal.at_least else min
    return replace(thresholds, **{name: stricter(before, move.value)})


def _passing(values: Array, move: _Move) -> Array:
    return values >= move.value if move.signal.at_least else values <= move.value
