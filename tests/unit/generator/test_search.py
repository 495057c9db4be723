from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.generator.failures import Failures, SearchCounters
from services.generator.perturbations import perturbations
from services.generator.search import MARGIN_EPSILON, ShardResult, margins, search
from services.generator.validity import radius_sd
from tests.unit.generator.world import (
    DECODES,
    DIM,
    NOISE_MODEL,
    SD,
    Array,
    check,
    checks,
    cut,
    joined,
    models,
    planted_sources,
    round_allocation,
    row_of,
    searched,
)

DIRECTIONS = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])


def all_draws(round_: int = 0) -> tuple[Array, Array, Array]:
    """Return row, draw and latent of every perturbation of the planted sources that a uniform search makes."""
    sources = planted_sources()
    row, draw = np.repeat(np.arange(20), DECODES), np.tile(np.arange(DECODES), 20)
    _, z = perturbations(NOISE_MODEL, SD, mu=sources.mu[row], source=sources.index[row], round_=round_, draw=draw)
    return row, draw, z.numpy()


def test_margins() -> None:
    """A margin is the label's logit minus the largest other one; logits are left as they are."""
    logits = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    np.testing.assert_allclose(margins(logits, np.array([0, 1])), [1.0, -2.0])
    np.testing.assert_array_equal(logits, [[3.0, 1.0, 2.0]] * 2)


def test_failures_are_all_planted_crossings() -> None:
    """Exactly the draws across the boundary are found, with identity, answer, margin and latent."""
    sources = planted_sources()
    found = searched(sources, round_allocation(sources, round_=4)).failures
    row, draw, z = all_draws(round_=4)
    crossed = 2 * np.rint(255 * z[:, 0]) / 255 < -MARGIN_EPSILON  # also as the picture that is stored
    assert 20 < crossed.sum() < 150
    np.testing.assert_array_equal(found.source, sources.index[row][crossed])
    np.testing.assert_array_equal(found.draw, draw[crossed])
    np.testing.assert_array_equal(found.latent, z[crossed])
    np.testing.assert_array_equal(found.round, 4)
    np.testing.assert_array_equal(found.true_label, 0)
    np.testing.assert_array_equal(found.predicted_label, 1)
    np.testing.assert_allclose(found.margin, 2 * z[crossed, 0], rtol=1e-5)
    np.testing.assert_allclose(found.radius_sd, radius_sd(z, sources.mu[row], SD)[crossed], rtol=1e-5)
    np.testing.assert_array_equal(found.held_out, sources.held_out[row][crossed])


@pytest.mark.parametrize("released", [False, True])
def test_a_failure_is_found_again_from_its_identity(released: bool) -> None:
    """Source, round, draw, seed and law alone give the latent of a failure, bit for bit, and it still is one."""
    sources, noise_model = planted_sources(), replace(NOISE_MODEL, released=released)

    def diagonal(images: Array) -> Array:
        total = images.reshape(len(images), DIM).sum(axis=1)
        return np.stack([1.5 - total, total - 1.5], axis=1)

    wanted = round_allocation(sources, round_=2, directions=DIRECTIONS, screen=True)
    found = searched(sources, wanted, noise_model, models(diagonal)).failures
    assert len(found.source) > 20
    for source, round_, draw, latent in zip(found.source, found.round, found.draw, found.latent, strict=True):
        mu = sources.mu[row_of(source)][None]
        _, z = perturbations(
            noise_model, SD, mu=mu, source=np.array([source]), round_=int(round_), draw=np.array([draw])
        )
        np.testing.assert_array_equal(z[0], latent)
        assert diagonal(z.numpy())[0].argmax() == 1


@given(border=st.integers(0, 20), batch_size=st.integers(1, 300), round_=st.integers(0, 3), screen=st.booleans())
def test_shards_and_batches_change_nothing(border: int, batch_size: int, round_: int, screen: bool) -> None:
    """Shards of any size searched in batches of any size give the same failures, counts and tallies."""
    sources, noise_model = planted_sources(), replace(NOISE_MODEL, max_failures_per_source=3)
    wanted = round_allocation(
        sources, np.arange(20) % 7 * 2, round_=round_, found=np.arange(20) % 3, directions=DIRECTIONS, screen=screen
    )
    half = check("label_probability", lambda z: z[:, 1] > -0.5)
    checked = checks(half, screening=lambda z, label, radius: z[:, 1] > -0.5)
    whole = searched(sources, wanted, noise_model, checked=checked)
    parts = [
        searched(cut(sources, rows), cut(wanted, rows), replace(noise_model, batch_size=batch_size), checked=checked)
        for rows in (slice(border), slice(border, None))
    ]
    assert len(whole.failures.source) > 5
    expected, got = joined([whole]), joined(parts)
    for name, array in expected.items():
        if name.startswith("directions."):  # sums of floats, added in another order
            np.testing.assert_allclose(got[name], array, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_tallies_are_those_of_all_decodes() -> None:
    """A shard tells decodes, margins and squared margins of each source, failures or not."""
    sources = planted_sources()
    result = searched(sources, round_allocation(sources, np.arange(20) % 4))
    row, draw, z = all_draws()
    decoded = draw < row % 4
    margin = 2.0 * z[decoded, 0]
    np.testing.assert_array_equal(result.decodes, np.arange(20) % 4)
    np.testing.assert_allclose(result.margin_sum, np.bincount(row[decoded], margin, 20), rtol=1e-5)
    np.testing.assert_allclose(result.margin_square_sum, np.bincount(row[decoded], margin**2, 20), rtol=1e-5)


def test_directions_are_summed_over_changes_of_the_margin() -> None:
    """A screened search sums steps and changes of the margin against the reconstruction; along x0 here, by 2 r sd."""
    sources = planted_sources()
    wanted = round_allocation(sources, 40, screen=True)
    sums = searched(sources, wanted).directions
    assert sums.count.tolist() == [800, 0]
    np.testing.assert_allclose(sums.y[0], 2 * NOISE_MODEL.radius_sd * SD[0] * sums.x[0, 0], rtol=1e-5)
    np.testing.assert_allclose(sums.directions()[0], [1, 0, 0], atol=0.1)
    assert not searched(sources, replace(wanted, screen=False)).directions.count.any()


def test_more_failures_where_the_direction_leads() -> None:
    """The same number of decodes finds more once the direction is known in which margins fall."""
    sources = planted_sources()
    blind, led = (
        searched(sources, round_allocation(sources, directions=directions, screen=True))
        for directions in (None, DIRECTIONS)
    )
    assert blind.counts.decodes == led.counts.decodes
    assert led.counts.failures > 1.5 * blind.counts.failures > 0


@pytest.mark.parametrize(("margin", "failures"), [(MARGIN_EPSILON / 2, 0), (MARGIN_EPSILON * 2, 240)])
def test_an_answer_within_rounding_is_no_failure(margin: float, failures: int) -> None:
    """A margin closer to 0 than the epsilon is no failure; one beyond it is."""
    result = searched(asked=models(lambda images: np.full((len(images), 2), [-margin, 0.0])))
    assert (len(result.failures.source), result.counts.candidates) == (failures, failures)


def test_no_failures() -> None:
    """A classifier without failures ends well, with empty arrays of the usual types."""
    result = searched(asked=models(lambda images: np.full((len(images), 2), [1.0, 0.0])))
    assert result.counts == SearchCounters(sources=20, decodes=240, classifications=240)
    for name, array in searched().failures.arrays().items():
        empty = result.failures.arrays()[name]
        assert (empty.dtype, empty.shape) == (array.dtype, (0, *array.shape[1:])), name
        assert Failures.none(DIM).arrays()[name].dtype == array.dtype, name


def test_sources_are_counted_in_the_first_round_only() -> None:
    """Every source is looked at once, however many rounds search around it."""
    sources = planted_sources()
    assert searched(sources, round_allocation(sources)).counts.sources == 20
    assert searched(sources, round_allocation(sources, round_=1)).counts.sources == 0


def test_nothing_to_search() -> None:
    """A shard without sources, or one that is given no decodes, gives nothing, and no error."""
    none = cut(planted_sources(), slice(0))
    for sources, wanted in (
        (none, round_allocation(none)),
        (planted_sources(), round_allocation(planted_sources(), 0, round_=1)),
    ):
        result = searched(sources, wanted)
        assert (result.failures.latent.shape, result.counts) == ((0, DIM), SearchCounters())
        assert result.decodes.tolist() == [0] * len(sources.index)


def test_unused_latent_dimension() -> None:
    """No step is made along a dimension without scale, and the radius stays finite."""
    sources, sd_agg = planted_sources(), np.array([1.0, 0.0, 2.0])
    found = searched(sources, asked=models(sd_agg=sd_agg)).failures
    np.testing.assert_array_equal(found.latent[:, 1], sources.mu[row_of(found.source), 1])
    assert np.isfinite(found.radius_sd).all()


def test_search_can_be_stopped() -> None:
    """`check` is called after every batch, also where failures are found again, and what it raises ends the search."""
    sources, calls = planted_sources(), 0

    def search_until(last: float) -> ShardResult:
        nonlocal calls
        calls = 0

        def stop() -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt

        return search(sources, round_allocation(sources), NOISE_MODEL, models(), checks(), classes=2, check=stop)

    counts = search_until(np.inf).counts
    batches = -(-counts.decodes // 32) - (-counts.candidates // 32)
    assert calls == batches > 8
    for last in (1, 3, batches):
        with pytest.raises(KeyboardInterrupt):
            search_until(last)
        assert calls == last
