"""The checks of a candidate: each rejects under its own name, and the first rejection counts."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from services.generator.failures import SearchCounters
from services.generator.pipeline import rounded
from services.generator.search import MARGIN_EPSILON
from services.generator.validity import radius_sd
from tests.unit.generator.world import (
    NOISE_MODEL,
    SD,
    Answered,
    Array,
    answering,
    check,
    checks,
    decode,
    encode,
    models,
    planes,
    planted_sources,
    round_allocation,
    searched,
)

REASONS = [field for field in vars(SearchCounters()) if field.startswith("rejected_by_")]
# Every planted crossing, in the order of sources and draws.
EVERYTHING = searched().failures
# Calls that this takes, before the second, separate ones.
FIRST_CALLS = -(-240 // NOISE_MODEL.batch_size)


def rejections(counts: SearchCounters) -> dict[str, int]:
    return {reason: value for reason in REASONS if (value := getattr(counts, reason))}


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("radius_sd", "rejected_by_radius"),
        ("label_probability", "rejected_by_label_model"),
        ("typicality", "rejected_by_typicality"),
        ("neighbour_agreement", "rejected_by_neighbours"),
    ],
)
def test_a_check_of_latents_rejects_under_its_name(field: str, reason: str) -> None:
    """A candidate that fails a latent check is rejected and counted; a passing one has the value recorded."""
    result = searched(checked=checks(check(field, lambda z: z[:, 1] > 0)))
    expected = EVERYTHING.take(EVERYTHING.latent[:, 1] > 0)
    np.testing.assert_array_equal(result.failures.latent, expected.latent)
    np.testing.assert_array_equal(result.failures.draw, expected.draw)
    np.testing.assert_array_equal(getattr(result.failures, field), 1.0)
    rejected = len(EVERYTHING.source) - len(expected.source)
    assert rejected > 10
    assert rejections(result.counts) == {reason: rejected}


def test_a_label_model_on_images_reads_what_is_stored() -> None:
    """It sees rounded images; what it rejects is counted, and no classifier is asked about it again."""
    asked: list[int] = []

    def answer(images: Array) -> Answered:
        asked.append(len(images))
        return Answered(planes(images))

    def probability(images: Array, _: Array) -> Array:
        np.testing.assert_array_equal(images, rounded(images))
        return np.where(images.reshape(len(images), -1)[:, 1] > 0, 0.75, 0.25)

    checked = replace(checks(), image_label_probability=probability, min_label_probability=0.5)
    result = searched(asked=replace(models(), submit=answer), checked=checked)
    expected = EVERYTHING.take(np.rint(255 * EVERYTHING.latent[:, 1]) > 0)
    np.testing.assert_array_equal(result.failures.latent, expected.latent)
    np.testing.assert_array_equal(result.failures.label_probability, 0.75)
    rejected = len(EVERYTHING.source) - len(expected.source)
    assert rejections(result.counts) == {"rejected_by_label_model": rejected}
    assert sum(asked) == result.counts.classifications == 240 + len(expected.source)


def test_the_first_check_that_fails_counts() -> None:
    """A candidate that fails several checks is counted under the first of them, and later ones never see it."""
    seen: list[Array] = []

    def late(z: Array) -> Array:
        seen.append(z)
        return z[:, 2] > 0

    result = searched(checked=checks(check("typicality", lambda z: z[:, 1] > 0), check("label_probability", late)))
    first, second = EVERYTHING.latent[:, 1] > 0, EVERYTHING.latent[:, 2] > 0
    assert rejections(result.counts) == {
        "rejected_by_typicality": (~first).sum(),
        "rejected_by_label_model": (first & ~second).sum(),
    }
    np.testing.assert_array_equal(seen[0], EVERYTHING.latent[first])
    np.testing.assert_array_equal(result.failures.latent, EVERYTHING.latent[first & second])


def test_what_does_not_come_back_is_rejected_by_its_round_trip() -> None:
    """The picture that would be stored, encoded again, must be near its latent; how near is recorded."""
    shift = np.array([[0.3, 0.0, 0.0]], np.float32)

    def forgetful(images: Array) -> tuple[Array, Array]:
        mu, sigma = encode(images)
        return np.where(mu[:, 1:2] > 0, mu, mu + shift), sigma

    result = searched(asked=models(encode=forgetful), checked=checks(max_round_trip_sd=0.1))
    expected = EVERYTHING.take(encode(rounded(decode(EVERYTHING.latent)))[0][:, 1] > 0)
    np.testing.assert_array_equal(result.failures.latent, expected.latent)
    stored = encode(rounded(decode(expected.latent)))[0]
    np.testing.assert_allclose(result.failures.round_trip_sd, radius_sd(stored, expected.latent, SD), atol=1e-6)
    assert rejections(result.counts) == {"rejected_by_round_trip": len(EVERYTHING.source) - len(expected.source)}


def test_confirmations_are_under_way_in_parallel() -> None:
    """Two decoders find two batches of failures again at the same time, each in a thread of its own."""
    both, size = threading.Barrier(2, timeout=60), len(EVERYTHING.source) // 4

    def meet(images: Array) -> tuple[Array, Array]:
        if len(images) == size:  # of four batches; what is left over meets nobody
            both.wait()
        return encode(images)

    result = searched(noise_model=replace(NOISE_MODEL, batch_size=size), asked=models(encode=meet))
    np.testing.assert_array_equal(result.failures.latent, EVERYTHING.latent)


def test_the_oracle_must_read_the_label() -> None:
    """A failure that the second classifier does not read as its label is rejected; its margin is recorded."""

    def by_x1(images: Array) -> Array:
        x1 = images[:, 0, 0, 1]
        return np.stack([3 * x1, np.zeros_like(x1)], axis=1)

    result = searched(asked=models(oracle=answering(by_x1)))
    margin = 3 * rounded(EVERYTHING.latent)[:, 1]
    expected = EVERYTHING.take(margin > MARGIN_EPSILON)
    np.testing.assert_array_equal(result.failures.latent, expected.latent)
    np.testing.assert_allclose(result.failures.oracle_margin, margin[margin > MARGIN_EPSILON], rtol=1e-5)
    assert rejections(result.counts) == {"rejected_by_oracle": (margin <= MARGIN_EPSILON).sum()}
    assert not searched().failures.oracle_margin.any()


class Fickle:
    """A classifier that answers the first `calls` calls as the plane does, and then in its own way."""

    def __init__(self, calls: int, *later: float) -> None:
        self.calls, self.later = itertools.count(-calls), later

    def __call__(self, images: Array) -> Answered:
        x = images.reshape(len(images), -1)
        if next(self.calls) < 0:
            return Answered(np.stack([x[:, 0], -x[:, 0], np.full(len(x), -9.0)], axis=1))
        return Answered(np.where(x[:, 1:2] > 0, [[-1.0, 1.0, -9.0]], [self.later]))


@pytest.mark.parametrize(
    "later",
    [(1.0, 0.0, 0.0), (0.0, MARGIN_EPSILON / 2, 0.0), (0.0, 0.0, 1.0)],
    ids=["right", "within rounding", "wrong in another way"],
)
def test_an_answer_that_changes_is_no_failure(later: tuple[float, float, float]) -> None:
    """Where a second, separate call gives another answer, nothing is stored, and the candidate is counted."""
    result = searched(asked=models(submit=Fickle(FIRST_CALLS, *later)))
    expected = EVERYTHING.take(EVERYTHING.latent[:, 1] > 0.5 / 255)
    np.testing.assert_array_equal(result.failures.latent, expected.latent)
    assert rejections(result.counts) == {"rejected_by_confirmation": len(EVERYTHING.source) - len(expected.source)}


def test_a_picture_that_is_right_once_it_is_stored_is_no_failure() -> None:
    """Stored images have eight bits: a failure that rounding corrects is not stored, but counted."""
    grey = 100.4 / 255

    def hair_fine(images: Array) -> Array:
        x0 = images[:, 0, 0, 0]
        return np.stack([1e3 * (grey - x0), np.zeros_like(x0)], axis=1)

    # Half a bit beyond the boundary: 100.45 of 255 is wrong, and 100, as which it is stored, is right.
    sources = planted_sources(2)
    mu = np.zeros_like(sources.mu)
    mu[:, 0] = [100.45 / 255, 101 / 255]
    still = replace(NOISE_MODEL, radius_sd=1e-9)
    found = searched(replace(sources, mu=mu), round_allocation(sources, 3), still, models(hair_fine))
    assert (found.failures.source == sources.index[1]).all()
    assert (found.counts.candidates, found.counts.failures) == (6, 3)
    assert rejections(found.counts) == {"rejected_by_confirmation": 3}


def test_the_first_reason_of_a_confirmation_counts() -> None:
    """Round trip, oracle and confirmation each ask only about what the ones before let pass."""
    asked = models(
        encode=lambda images: (encode(images)[0] + 9.0, encode(images)[1]),
        oracle=answering(lambda images: np.full((len(images), 2), [0.0, 1.0])),
        submit=Fickle(FIRST_CALLS, 1.0, 0.0, 0.0),
    )
    count = len(EVERYTHING.source)
    assert rejections(searched(asked=asked, checked=checks(max_round_trip_sd=1.0)).counts) == {
        "rejected_by_round_trip": count
    }
    asked = replace(asked, submit=Fickle(FIRST_CALLS, 1.0, 0.0, 0.0))
    assert rejections(searched(asked=asked).counts) == {"rejected_by_oracle": count}


def test_first_failures_of_each_source_are_kept() -> None:
    """The limit per source keeps the first draws of what was confirmed, those of earlier rounds counted."""
    sources, noise_model = planted_sources(), replace(NOISE_MODEL, max_failures_per_source=2)
    half = EVERYTHING.take(EVERYTHING.latent[:, 1] > 0)
    for earlier in range(4):
        wanted = round_allocation(sources, found=np.full(20, earlier))
        result = searched(sources, wanted, noise_model, checked=checks(check("typicality", lambda z: z[:, 1] > 0)))
        expected = [
            (source, draw)
            for source in np.unique(half.source)
            for draw in half.draw[half.source == source][: max(2 - earlier, 0)]
        ]
        assert list(zip(result.failures.source, result.failures.draw, strict=True)) == expected
        assert result.counts.rejected_by_source_limit == len(half.source) - len(expected) > 0


def test_every_candidate_is_accounted_for() -> None:
    """Each candidate is a failure or has one reason; decodes, encodes and classifications are counted."""

    def noisy(images: Array) -> tuple[Array, Array]:
        mu, sigma = encode(images)
        return mu + np.sin(1000 * mu[:, 2:]), sigma

    sources = planted_sources()
    result = searched(
        sources,
        round_allocation(sources, 40),
        replace(NOISE_MODEL, max_failures_per_source=1),
        models(encode=noisy, oracle=answering(lambda images: planes(images[..., 1:2].repeat(3, axis=3) + 0.5))),
        checks(
            check("label_probability", lambda z: z[:, 1] > -1.2),
            check("typicality", lambda z: z[:, 2] > -2.0),
            max_round_trip_sd=0.7,
        ),
    )
    counts = result.counts
    assert counts.candidates == counts.failures + sum(rejections(counts).values())
    assert len(rejections(counts)) == 5
    assert counts.failures == len(result.failures.source) > 3
    again = counts.candidates - counts.rejected_by_label_model - counts.rejected_by_typicality
    assert (counts.decodes, counts.decodes_again, counts.encodes) == (800, again, again)
    assert counts.classifications == 800 + 2 * again  # the model under test and the oracle
