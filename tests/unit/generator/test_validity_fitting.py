from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from services.arrays import Array
from services.generator.validity import SIGNALS, FittedThresholds, Thresholds, fit_thresholds

HAD = Thresholds(
    max_radius_sd=1.0,
    min_typicality=0.01,
    min_label_probability=0.998,
    min_neighbour_agreement=0.8,
    max_round_trip_sd=1.0,
)
# What tells nothing: the same for all failures.
SAME = {
    "label_probability": 0.999,
    "neighbour_agreement": 0.9,
    "typicality": 0.5,
    "round_trip_sd": 0.4,
    "radius_sd": 0.5,
}
Region = Mapping[str, Array]


def region(failures: int = 100, **signals: Any) -> Region:
    """Return the signals of a region's failures; those that are not given are the same everywhere."""
    return {
        name: np.broadcast_to(np.asarray(signals.get(name, value), np.float32), failures)
        for name, value in SAME.items()
    }


def moved(advice: FittedThresholds) -> dict[str, float]:
    """Return the thresholds that are no longer those that the run had."""
    return {name: value for name, value in asdict(advice.thresholds).items() if value != getattr(HAD, name)}


@pytest.mark.parametrize(
    ("signal", "valid", "invalid"),
    [
        ("label_probability", 0.9999, 0.9985),
        ("neighbour_agreement", 1.0, 0.8),
        ("typicality", 0.6, 0.1),
        ("round_trip_sd", 0.3, 0.8),
        ("radius_sd", 0.4, 0.9),
    ],
)
def test_a_signal_that_separates_sets_its_threshold(signal: str, valid: float, invalid: float) -> None:
    """Where one signal parts invalid from labelled failures, its threshold lies halfway, and no other moves."""
    advice = fit_thresholds([region(**{signal: invalid})], [region(**{signal: valid})], HAD)
    [name] = [one.threshold for one in SIGNALS if one.field == signal]
    assert moved(advice) == {name: pytest.approx((valid + invalid) / 2, rel=1e-5)}
    assert (advice.invalid_rejected, advice.valid_rejected) == pytest.approx((1.0, 0.0))


def test_signals_that_tell_nothing_move_nothing() -> None:
    """The same signals in invalid and labelled regions leave every threshold as it was."""
    values = np.linspace(0.1, 0.9, 100)
    alike = {"typicality": values, "radius_sd": values}
    advice = fit_thresholds([region(**alike)], [region(**alike)], HAD)
    assert moved(advice) == {}
    assert (advice.invalid_rejected, advice.valid_rejected) == (0.0, 0.0)


def test_signals_that_tell_the_wrong_way_move_nothing() -> None:
    """Invalid failures that are more typical than labelled ones are no reason to refuse what is untypical."""
    advice = fit_thresholds([region(typicality=0.9)], [region(typicality=np.linspace(0.1, 0.5, 100))], HAD)
    assert moved(advice) == {}


def test_no_more_than_a_tenth_of_the_labelled_failures_is_lost() -> None:
    """A threshold that parts best at the price of a quarter of the labelled failures stops at a tenth of them."""
    even = np.linspace(0.1, 0.9, 100)
    advice = fit_thresholds([region(typicality=np.linspace(0.1, 0.3, 100))], [region(typicality=even)], HAD)
    assert even[9] < moved(advice)["min_typicality"] <= even[10]
    assert advice.valid_rejected == pytest.approx(0.1)
    assert 0.3 < advice.invalid_rejected < 0.5


def test_the_bound_holds_for_thresholds_together() -> None:
    """Two signals that each lose six in a hundred of other labelled failures: only one of them moves."""
    odd = np.full(100, 0.5)
    first, second = odd.copy(), odd.copy()
    first[:6], second[-6:] = 0.1, 0.9
    valid = [region(typicality=first, radius_sd=second)]
    invalid = [region(typicality=np.repeat([0.1, 0.5], 50), radius_sd=np.repeat([0.5, 0.9], 50))]
    advice = fit_thresholds(invalid, valid, HAD)
    assert len(moved(advice)) == 1
    assert (advice.invalid_rejected, advice.valid_rejected) == pytest.approx((0.5, 0.06))


def test_every_region_counts_the_same() -> None:
    """A large invalid region that no threshold tells does not outvote a small one that one does, nor the other way."""
    small, large = region(10, typicality=0.1), region(1000, radius_sd=0.9)
    advice = fit_thresholds([small, large], [region(50)], HAD)
    assert set(moved(advice)) == {"min_typicality", "max_radius_sd"}
    assert advice.invalid_rejected == pytest.approx(1.0)
    # Of two labelled regions the small one would be lost: that is half, whatever the size of the other.
    lost = [region(10, typicality=0.1), region(1000, typicality=0.6)]
    assert moved(fit_thresholds([region(typicality=0.1)], lost, HAD)) == {}


def test_thresholds_are_never_looser_than_before() -> None:
    """A value that was stored in less precision than it was held against does not loosen a threshold."""
    below = region(label_probability=np.repeat([0.9979, 0.99795], 50))
    advice = fit_thresholds([below], [region(label_probability=0.99798)], HAD)
    assert advice.thresholds.min_label_probability == HAD.min_label_probability
    assert advice.invalid_rejected == pytest.approx(1.0)


def test_a_step_that_gains_too_little_is_none() -> None:
    """One failure in two hundred is no reason to move a threshold."""
    one = np.full(200, 0.5)
    one[0] = 0.1
    assert moved(fit_thresholds([region(200, typicality=one)], [region()], HAD)) == {}
    one[:3] = 0.1
    assert set(moved(fit_thresholds([region(200, typicality=one)], [region()], HAD))) == {"min_typicality"}


def test_values_that_are_next_to_each_other() -> None:
    """Neighbours in single precision are told apart, and the search ends."""
    low = np.float32(0.9999)
    high = np.nextafter(low, np.float32(1))
    advice = fit_thresholds([region(label_probability=low)], [region(label_probability=high)], HAD)
    assert float(low) < advice.thresholds.min_label_probability < float(high)
    assert advice.invalid_rejected == pytest.approx(1.0)
