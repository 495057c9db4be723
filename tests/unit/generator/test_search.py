"""The search in a planted world: an image is its latent, and the classifier's boundary is the plane x0 = 0.

Sources of label 0 lie at x0 > 0; a step that crosses to x0 < 0 is taken for label 1, with margin 2 * x0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from services.generator.search import (
    MARGIN_EPSILON,
    Counts,
    Failures,
    Law,
    Models,
    Sources,
    choose_sources,
    is_held_out,
    margins,
    noise,
    nothing,
    perturb,
    search,
)

Array = npt.NDArray[Any]
DIM = 3
SD = np.array([1.0, 0.5, 2.0])
LAW = Law(seed=5, radius_sd=0.8, draws=12, max_failures_per_source=12, min_label_probability=0.0, batch_size=32)


@dataclass(frozen=True)
class Answered:
    """Logits that have arrived."""

    logits: Array

    def result(self) -> Array:
        return self.logits


def decode(z: Array) -> Array:
    return z.reshape(len(z), 1, 1, DIM).astype(np.float32)


def planes(images: Array) -> Array:
    x0 = images.reshape(len(images), DIM)[:, 0]
    return np.stack([x0, -x0], axis=1)


def always_believed(z: Array, _: Array) -> Array:
    return np.ones(len(z))


def models(
    classify: Callable[[Array], Array] = planes,
    label_probability: Callable[[Array, Array], Array] = always_believed,
    sd_agg: Array = SD,
) -> Models:
    return Models(
        decode=decode,
        submit=lambda images: Answered(classify(images)),
        label_probability=label_probability,
        sd_agg=sd_agg,
    )


def planted_sources(count: int = 20) -> Sources:
    """Plant sources at x0 from 0.2 to 1.2, with positions in the split that have gaps."""
    mu = np.random.default_rng(1).standard_normal((count, DIM)).astype(np.float32)
    mu[:, 0] = np.linspace(0.2, 1.2, count)
    return Sources(
        index=np.arange(count) * 3 + 7,
        images=decode(mu),
        labels=np.zeros(count, np.int64),
        mu=mu,
        held_out=np.arange(count) % 3 == 0,
    )


def cut(sources: Sources, rows: slice) -> Sources:
    return Sources(**{name: getattr(sources, name)[rows] for name in ("index", "images", "labels", "mu", "held_out")})


def joined(parts: list[Failures]) -> dict[str, Array]:
    return {name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}


def assert_same(first: dict[str, Array], second: dict[str, Array]) -> None:
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_noise_is_standard_normal() -> None:
    """Noise is N(0, I): centred, of unit variance, uncorrelated between dimensions and between draws."""
    eps = noise(seed=3, source=np.arange(20_000) // 10, round_=0, draw=np.arange(20_000) % 10, dim=4)
    assert stats.kstest(eps.ravel(), "norm").pvalue > 0.01
    np.testing.assert_allclose(eps.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(eps.T), np.eye(4), atol=0.04)
    assert abs(np.corrcoef(eps[:-1, 0], eps[1:, 0])[0, 1]) < 0.03


def test_noise_is_a_pure_function_of_its_identity() -> None:
    """A row of noise depends on (seed, source, round, draw) alone, not on the rows beside it."""
    source, draw = np.arange(50), np.arange(50) % 7
    whole = noise(seed=3, source=source, round_=2, draw=draw, dim=5)
    order = np.random.default_rng(0).permutation(50)[:20]
    np.testing.assert_array_equal(whole[order], noise(seed=3, source=source[order], round_=2, draw=draw[order], dim=5))


@pytest.mark.parametrize("other", [{"seed": 4}, {"source": 12}, {"round_": 1}, {"draw": 1}])
def test_noise_changes_with_each_part_of_the_identity(other: dict[str, int]) -> None:
    """Another seed, source, round or draw gives other noise in every dimension."""
    identity = {"seed": 3, "source": 11, "round_": 0, "draw": 0}
    first, second = (
        noise(
            seed=part["seed"],
            source=np.array([part["source"]]),
            round_=part["round_"],
            draw=np.array([part["draw"]]),
            dim=6,
        )
        for part in (identity, identity | other)
    )
    assert (np.abs(first - second) > 1e-9).all()


def test_largest_seed() -> None:
    """Every seed of 64 bits can be used."""
    assert np.isfinite(noise(seed=2**64 - 1, source=np.arange(3), round_=0, draw=np.zeros(3, int), dim=2)).all()
    assert len(choose_sources(seed=2**64 - 1, count=10, limit=4)) == 4


def test_perturb_steps_in_units_of_the_aggregate_deviation() -> None:
    """A perturbation is mu + r * sd_agg * eps."""
    z = perturb(np.array([[1.0, 2.0]]), np.array([0.5, 3.0]), np.array([[1.0, -1.0]]), 0.1)
    np.testing.assert_allclose(z, [[1.05, 1.7]], rtol=1e-6)


def test_margins() -> None:
    """A margin is the label's logit minus the largest other one."""
    np.testing.assert_allclose(margins(np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), np.array([0, 1])), [1.0, -2.0])


def test_failures_are_all_planted_crossings() -> None:
    """What is found is every draw that crosses the boundary, no other, with label, answer, margin and latent."""
    sources = planted_sources()
    found, _ = search(sources, LAW, models(), round_=4)
    row = np.repeat(np.arange(20), LAW.draws)
    draw = np.tile(np.arange(LAW.draws), 20)
    eps = noise(seed=LAW.seed, source=sources.index[row], round_=4, draw=draw, dim=DIM)
    z = (sources.mu[row] + LAW.radius_sd * SD * eps).astype(np.float32)
    crossed = 2 * z[:, 0] < -MARGIN_EPSILON
    assert 20 < crossed.sum() < 150
    np.testing.assert_array_equal(found.source, sources.index[row][crossed])
    np.testing.assert_array_equal(found.draw, draw[crossed])
    np.testing.assert_array_equal(found.latent, z[crossed])
    np.testing.assert_array_equal(found.round, 4)
    np.testing.assert_array_equal(found.true_label, 0)
    np.testing.assert_array_equal(found.predicted_label, 1)
    np.testing.assert_allclose(found.margin, 2 * z[crossed, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.held_out, sources.held_out[row][crossed])


def test_radius_is_the_length_of_the_step() -> None:
    """The radius stored is norm((z - mu) / sd_agg) / sqrt(d)."""
    sources = planted_sources()
    found, _ = search(sources, LAW, models())
    mu = sources.mu[(found.source - 7) // 3]
    expected = np.linalg.norm((found.latent - mu) / SD, axis=1) / np.sqrt(DIM)
    np.testing.assert_allclose(found.radius_sd, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("border", [1, 9])
def test_cut_and_batch_size_change_nothing(batch_size: int, border: int) -> None:
    """Shards of any size searched in batches of any size give the same failures and the same counts."""
    sources, law = planted_sources(), replace(LAW, max_failures_per_source=3)
    whole, counts = search(sources, law, models())
    parts = [
        search(cut(sources, rows), replace(law, batch_size=batch_size), models())
        for rows in (slice(border), slice(border, None))
    ]
    assert len(whole.source) > 10
    assert_same(whole.arrays(), joined([failures for failures, _ in parts]))
    for name, value in vars(counts).items():
        assert value == sum(getattr(part, name) for _, part in parts), name


def test_sources_that_are_wrong_already_are_not_searched() -> None:
    """A source that is wrong as an image or as a reconstruction is left out, and counted once, the image first."""
    sources = planted_sources(6)
    images, mu = sources.images.copy(), sources.mu.copy()
    images[[0, 2], ..., 0] = -1.0
    mu[[2, 3, 5], 0] = -1.0
    found, counts = search(replace(sources, images=images, mu=mu), LAW, models())
    assert (counts.sources, counts.sources_wrong_on_image, counts.sources_wrong_on_reconstruction) == (6, 2, 2)
    assert counts.decodes == 2 * LAW.draws
    assert set(found.source) <= set(sources.index[[1, 4]])


def test_counts_add_up() -> None:
    """Candidates are rejected by the label model, rejected by the source limit, or failures."""
    law = replace(LAW, max_failures_per_source=2, min_label_probability=0.5)
    found, counts = search(planted_sources(), law, models(label_probability=lambda z, _: (z[:, 1] > 0).astype(float)))
    assert counts.decodes == counts.sources * law.draws == 240
    assert counts.candidates == counts.rejected_by_label_model + counts.rejected_by_source_limit + counts.failures
    assert counts.failures == len(found.source)
    assert min(counts.rejected_by_label_model, counts.rejected_by_source_limit, counts.failures) > 0


def test_what_lost_its_label_is_rejected() -> None:
    """A candidate is kept from the least label probability upwards, and says how probable its label is."""
    law = replace(LAW, min_label_probability=0.5)
    believed = models(label_probability=lambda z, labels: np.where(z[:, 1] > 0, 0.5, 0.49) + labels)
    found, counts = search(planted_sources(), law, believed)
    everything, _ = search(planted_sources(), LAW, models())
    expected = everything.take(everything.latent[:, 1] > 0)
    np.testing.assert_array_equal(found.latent, expected.latent)
    np.testing.assert_array_equal(found.draw, expected.draw)
    assert counts.rejected_by_label_model == (everything.latent[:, 1] <= 0).sum()
    np.testing.assert_array_equal(found.label_probability, 0.5)


def test_first_failures_of_each_source_are_kept() -> None:
    """The limit per source keeps the first draws, after the label model had its say."""
    law = replace(LAW, max_failures_per_source=2)
    found, _ = search(planted_sources(), law, models())
    everything, _ = search(planted_sources(), LAW, models())
    expected = [
        (source, draw)
        for source in np.unique(everything.source)
        for draw in everything.draw[everything.source == source][:2]
    ]
    assert list(zip(found.source, found.draw, strict=True)) == expected
    assert len(expected) < len(everything.source)


@pytest.mark.parametrize(("margin", "failures"), [(MARGIN_EPSILON / 2, 0), (MARGIN_EPSILON * 2, 240)])
def test_an_answer_within_rounding_is_no_failure(margin: float, failures: int) -> None:
    """A margin closer to 0 than the epsilon is no failure; one beyond it is."""
    sources = planted_sources()

    def classify(images: Array) -> Array:
        known = np.isin(images[:, 0, 0, 0], sources.mu[:, 0])
        return np.stack([np.where(known, 1.0, -margin), np.zeros(len(images))], axis=1)

    found, counts = search(sources, LAW, models(classify))
    assert (len(found.source), counts.candidates) == (failures, failures)


def test_a_source_within_rounding_is_not_searched() -> None:
    """A source that is right by less than the epsilon counts as wrong."""
    _, counts = search(planted_sources(4), LAW, models(lambda images: np.full((len(images), 2), [1e-4, 0.0])))
    assert (counts.sources_wrong_on_image, counts.decodes) == (4, 0)


def test_no_failures() -> None:
    """A classifier without failures ends well, with empty arrays of the usual types."""
    found, counts = search(planted_sources(), LAW, models(lambda images: np.full((len(images), 2), [1.0, 0.0])))
    some, _ = search(planted_sources(), LAW, models())
    assert counts == Counts(sources=20, decodes=240)
    for name, array in some.arrays().items():
        empty = found.arrays()[name]
        assert (empty.dtype, empty.shape) == (array.dtype, (0, *array.shape[1:])), name
        assert nothing(DIM).arrays()[name].dtype == array.dtype, name


def test_no_sources() -> None:
    """A shard without sources gives nothing, and no error."""
    found, counts = search(cut(planted_sources(), slice(0)), LAW, models())
    assert (found.latent.shape, counts) == ((0, DIM), Counts())


def test_unused_latent_dimension() -> None:
    """No step is made along a dimension without scale, and the radius stays finite."""
    sources = planted_sources()
    found, _ = search(sources, LAW, models(sd_agg=np.array([1.0, 0.0, 2.0])))
    np.testing.assert_array_equal(found.latent[:, 1], sources.mu[(found.source - 7) // 3, 1])
    assert np.isfinite(found.radius_sd).all()


def test_decoding_runs_ahead_a_little() -> None:
    """Some batches are sent before the first answer is asked for, but never all of them."""
    sent, asked, most = 0, 0, 0

    class Watched(Answered):
        def result(self) -> Array:
            nonlocal asked
            asked += 1
            return self.logits

    def submit(images: Array) -> Watched:
        nonlocal sent, most
        sent += 1
        most = max(most, sent - asked)
        return Watched(planes(images))

    search(planted_sources(), replace(LAW, batch_size=4), replace(models(), submit=submit))
    assert sent == asked == 2 * 5 + 60
    assert 2 < most < 8


def test_search_can_be_stopped() -> None:
    """What `on_batch` raises ends the search before the next batch is decoded."""
    shares = []

    def stop(share: float) -> None:
        shares.append(share)
        if len(shares) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(planted_sources(), LAW, models(), on_batch=stop)
    assert len(shares) == 3
    assert 0 <= shares[0] < shares[1] < shares[2] <= 1


def test_sources_are_chosen_by_seed() -> None:
    """At most `limit` distinct positions, ascending, the same for the same seed; all of them without a limit."""
    chosen = choose_sources(seed=1, count=1000, limit=200)
    assert len(chosen) == 200
    assert (np.diff(chosen) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < 1000
    np.testing.assert_array_equal(chosen, choose_sources(seed=1, count=1000, limit=200))
    assert len(np.intersect1d(chosen, choose_sources(seed=2, count=1000, limit=200))) < 80
    assert abs(chosen.mean() - 500) < 80
    for limit in (0, 1000, 2000):
        np.testing.assert_array_equal(choose_sources(seed=1, count=1000, limit=limit), np.arange(1000))


def test_held_out_sources_are_a_share_drawn_by_seed_and_source() -> None:
    """The share is as asked for, the same whichever sources are asked about, and independent of the choice."""
    sources = np.arange(20_000)
    held_out = is_held_out(seed=1, source=sources, fraction=0.3)
    assert abs(held_out.mean() - 0.3) < 0.015
    np.testing.assert_array_equal(held_out[100:120], is_held_out(seed=1, source=sources[100:120], fraction=0.3))
    assert abs((held_out == is_held_out(seed=2, source=sources, fraction=0.3)).mean() - 0.58) < 0.02
    chosen = choose_sources(seed=1, count=20_000, limit=5000)
    assert abs(held_out[chosen].mean() - 0.3) < 0.03
