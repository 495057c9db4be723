"""The questions of the gate, asked of candidates that are known to be as good or worse."""

import numpy as np
import pytest
from scipy.special import log_softmax

from services.arrays import Array
from services.corrector.gate import checks
from services.statistics.hypothesis_tests import PairedReadings

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def readings(before: Array, after: Array) -> PairedReadings:
    return PairedReadings(before=before.astype(bool), after=after.astype(bool))


def changed(n: int, *, lost: int, gained: int) -> PairedReadings:
    """Of n images, of which the version before reads nine in ten, so many change."""
    before = np.arange(n) % 10 > 0
    after = before.copy()
    after[np.flatnonzero(before)[:lost]] = False
    after[np.flatnonzero(~before)[:gained]] = True
    return readings(before, after)


@pytest.mark.parametrize(("lost", "gained", "passes"), [(0, 0, True), (10, 10, True), (15, 0, True), (60, 20, False)])
def test_the_test_split_must_be_non_inferior_for_certain(lost: int, gained: int, passes: bool) -> None:
    """A hundredth of 4,000 images is 40; the interval must lie above it."""
    check = checks.accuracy_check(changed(4000, lost=lost, gained=gained), 0.01)
    assert check.passed is passes
    assert check.figure == pytest.approx((gained - lost) / 4000)
    assert (check.bound, check.trials) == (-0.01, 4000)


def test_with_few_images_the_test_split_does_not_pass_in_doubt() -> None:
    """Nothing is lost on 50 images, but a loss of a hundredth cannot be excluded."""
    assert not checks.accuracy_check(changed(50, lost=0, gained=0), 0.01).passed


def test_one_class_made_worse_is_named() -> None:
    """Twelve of 300 images of one class are lost, and won in another: the whole shows nothing, the class does."""
    labels = np.repeat([0, 1, 2], 300)
    before = np.ones(900, bool)
    before[:20] = False
    after = np.ones(900, bool)
    after[600:612] = False
    found = {check.subject: check for check in checks.class_checks(readings(before, after), labels, CLASSES)}
    assert checks.accuracy_check(readings(before, after), 0.01).passed
    assert {name: check.passed for name, check in found.items()} == {"cat": True, "dog": True, "owl": False}
    assert found["owl"].figure == pytest.approx(-0.04)
    # Six heads in a row are below 0.05 / 3.
    assert "the smallest that would have shown is 0.025" in found["owl"].rule


def test_classes_by_chance_are_seldom_stopped(random: np.random.Generator) -> None:
    """Both versions err on three of a hundred images of their own: at most one in twenty is stopped."""
    labels, stopped = np.repeat(np.arange(10), 200), 0
    for _ in range(200):
        pair = readings(random.random(2000) > 0.03, random.random(2000) > 0.03)
        found = checks.class_checks(pair, labels, [str(label) for label in range(10)])
        stopped += not all(check.passed for check in found)
    assert stopped / 200 <= 0.05


def test_a_class_without_test_images_is_not_asked_about() -> None:
    """Only classes that occur are checked."""
    found = checks.class_checks(changed(20, lost=0, gained=0), np.full(20, 1), CLASSES)
    assert [check.subject for check in found] == ["dog"]


def test_a_region_of_the_bank_that_is_lost_stops_the_candidate() -> None:
    """A region may lose two images in a hundred, and more only by chance."""
    kept, gone = changed(256, lost=2, gained=0), changed(256, lost=40, gained=0)
    found = {check.subject: check.passed for check in checks.region_checks({"r1": kept, "r2": gone})}
    assert found == {"r1": True, "r2": False}
    assert checks.region_checks({}) == []


@pytest.mark.parametrize(("gained", "passes"), [(30, True), (0, False)])
def test_a_correction_must_gain_on_its_regions(gained: int, passes: bool) -> None:
    """No gain is no correction."""
    before = np.zeros(40, bool)
    assert checks.gain_check(readings(before, np.arange(40) < gained)).passed is passes


def answers(random: np.random.Generator, labels: Array, temperature: float = 1.0) -> Array:
    """Log-probabilities that are calibrated at temperature 1: labels are drawn from them."""
    logits = 3 * random.standard_normal((len(labels), 3))
    chances = np.exp(log_softmax(logits, axis=1))
    labels[:] = (random.random((len(labels), 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=2)
    return np.asarray(log_softmax(logits / temperature, axis=1))


@pytest.mark.parametrize(("temperature", "passes"), [(1.0, True), (1.05, True), (0.4, False), (3.0, False)])
def test_miscalibration_is_told_from_accuracy(random: np.random.Generator, temperature: float, passes: bool) -> None:
    """A temperature changes no answer, but what the answers are worth."""
    labels = np.zeros(3000, np.int64)
    before = answers(random, labels)
    after = np.asarray(log_softmax(before / temperature, axis=1))
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    check = checks.calibration_check(before, after, labels)
    assert check.passed is passes
    assert check.figure == pytest.approx(0, abs=0.005) if temperature == 1 else check.figure > 0


def test_latency_is_compared_turn_by_turn(random: np.random.Generator) -> None:
    """A machine that is three times as slow for a while hides neither twice the work nor the same."""
    load = np.where(np.arange(60) < 30, 3.0, 1.0) * 0.002
    noise = 1 + 0.1 * random.random((2, 60))
    same = checks.latency_check(1, load * noise[0], load * noise[1])
    twice = checks.latency_check(8, load * noise[0], 2 * load * noise[1])
    assert same.passed
    assert not twice.passed
    assert twice.subject == "batch 8"
    assert twice.interval is not None
    assert twice.interval[0] < twice.figure < twice.interval[1]


def test_executions_must_agree(random: np.random.Generator) -> None:
    """Rounding passes; another output, another shape or no number does not."""
    one = random.standard_normal((4, 3)).astype(np.float32)
    assert checks.parity_check("a and b", 4, one, one + 1e-6).passed
    assert not checks.parity_check("a and b", 4, one, one + 0.1).passed
    assert not checks.parity_check("a and b", 4, one, one[:3]).passed
    broken = one.copy()
    broken[0, 0] = np.nan
    check = checks.parity_check("a and b", 4, one, broken)
    assert (check.passed, check.figure) == (False, 1.0)
