from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from services.generator.noise import released_noise, standard_normal
from services.generator.perturbations import (
    CANDIDATES,
    NoiseModel,
    PerturbationBatch,
    RoundAllocation,
    Screening,
    Sources,
    draw_perturbations,
    first_passing,
    perturbations,
    rebatched,
)
from services.generator.validity import radius_sd
from tests.unit.generator.world import CPU, DIM, NOISE_MODEL, SD, cut, planted_sources, round_allocation

Array = npt.NDArray[Any]
RELEASED = replace(NOISE_MODEL, released=True)


def rule(passes: Callable[[Tensor], Tensor]) -> Screening:
    """Return a screening by a rule on latents (n, d) alone."""
    return lambda z, label, radius: passes(z)


HALF = rule(lambda z: z[:, 1] > 0)
# Nearly nothing passes: whole slots are left without a valid draw.
FEW = rule(lambda z: z[:, 1] > 0.9)
DIRECTIONS = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])


def drawn(
    sources: Sources, wanted: RoundAllocation, noise_model: NoiseModel = NOISE_MODEL, screening: Screening | None = None
) -> tuple[PerturbationBatch, int]:
    """Return all draws one after the other, and how many were screened out."""
    parts, screened_out = zip(
        *(make() for make in draw_perturbations(sources, wanted, noise_model, SD, screening, CPU)), strict=True
    )
    (whole,) = rebatched(parts, 100_000) if any(len(part.row) for part in parts) else [parts[0]]
    return whole, sum(screened_out)


def perturbed(*args: Any, **identity: Any) -> tuple[Array, Array]:
    """Return noise and latents of perturbations as arrays."""
    eps, z = perturbations(*args, **identity)
    return eps.numpy(), z.numpy()


def slots_of(sources: Sources, wanted: RoundAllocation) -> tuple[Array, Array, Array, Array]:
    """Return every draw that a screened search may take: row (s,), and draw, eps and z of each slot (s, CANDIDATES)."""
    row = np.repeat(np.arange(len(sources.index)), wanted.decodes)
    draw = np.concatenate([np.arange(count * CANDIDATES) for count in wanted.decodes])
    wide = np.repeat(row, CANDIDATES)
    mu, source = sources.mu[wide], sources.index[wide]
    eps, z = perturbed(NOISE_MODEL, SD, mu=mu, source=source, round_=wanted.round_, draw=draw)
    by_slot = (-1, CANDIDATES)
    return row, draw.reshape(by_slot), eps.reshape(*by_slot, DIM), z.reshape(*by_slot, DIM)


def test_a_step_is_in_units_of_the_aggregate_deviation() -> None:
    """A perturbation is mu + r * sd_agg * eps, eps the noise of its identity."""
    source, draw, mu = np.array([4, 4, 9]), np.array([0, 1, 1]), np.ones((3, DIM), np.float32)
    eps, z = perturbed(NOISE_MODEL, SD, mu=mu, source=source, round_=2, draw=draw)
    identity = {"source": torch.tensor(source), "draw": torch.tensor(draw)}
    np.testing.assert_array_equal(eps, standard_normal(seed=NOISE_MODEL.seed, round_=2, dim=DIM, **identity))
    np.testing.assert_allclose(z, mu + NOISE_MODEL.radius_sd * SD * eps, rtol=1e-6)
    assert z.dtype == np.float32


def test_released_noise_steps_by_itself_alone() -> None:
    """The released code adds its noise to the latent as it is: neither radius nor scale have an effect."""
    source, draw, mu = np.arange(5), np.zeros(5, int), np.ones((5, DIM), np.float32)
    noise = released_noise(
        seed=NOISE_MODEL.seed, source=torch.tensor(source), round_=0, draw=torch.tensor(draw), dim=DIM
    ).numpy()
    for noise_model, sd_agg in ((RELEASED, SD), (replace(RELEASED, radius_sd=3.0), 7 * SD)):
        eps, z = perturbed(noise_model, sd_agg, mu=mu, source=source, round_=0, draw=draw)
        np.testing.assert_array_equal(eps, noise)
        np.testing.assert_allclose(z, mu + noise, rtol=1e-6)


def test_radii_follow_their_distribution() -> None:
    """The squared radius is radius_sd**2 times a chi-square of d degrees over d: its root mean square is radius_sd."""
    source, mu = np.arange(5000), np.full((5000, DIM), 2.0, np.float32)
    _, z = perturbed(NOISE_MODEL, SD, mu=mu, source=source, round_=0, draw=np.zeros(5000, int))
    radius = radius_sd(z, mu, SD)
    assert np.sqrt((radius**2).mean()) == pytest.approx(NOISE_MODEL.radius_sd, rel=0.02)
    assert stats.kstest(DIM * (radius / NOISE_MODEL.radius_sd) ** 2, stats.chi2(DIM).cdf).pvalue > 0.01


def test_uniform_search_decodes_every_draw() -> None:
    """Without screening each source gets its draws from 0 on, in source order, whatever a check would say of them."""
    sources = planted_sources(4)
    found, screened_out = drawn(sources, round_allocation(sources, np.array([3, 0, 1, 2])), screening=FEW)
    np.testing.assert_array_equal(found.row, [0, 0, 0, 2, 3, 3])
    np.testing.assert_array_equal(found.draw, [0, 1, 2, 0, 0, 1])
    assert screened_out == 0


def test_a_slot_decodes_its_most_promising_valid_draw() -> None:
    """Of a slot's draws the valid one is taken that steps furthest against the direction of its source's class."""
    sources = replace(planted_sources(), labels=np.arange(20) % 2)
    wanted = round_allocation(sources, 5, round_=3, directions=DIRECTIONS, screen=True)
    found, screened_out = drawn(sources, wanted, screening=HALF)
    row, draw, eps, z = slots_of(sources, wanted)
    promise = -np.einsum("scd,sd->sc", eps, DIRECTIONS[sources.labels[row]])
    valid = z[..., 1] > 0
    best = np.where(valid, promise, -np.inf).argmax(axis=1)
    some = valid.any(axis=1)
    assert 0 < some.sum() < len(row)
    slots = np.arange(len(row))[some]
    np.testing.assert_array_equal(found.row, row[some])
    np.testing.assert_array_equal(found.draw, draw[slots, best[some]])
    np.testing.assert_array_equal(found.z, z[slots, best[some]])
    np.testing.assert_array_equal(found.latent, found.z)
    # Ruled out is what was asked about in vain: all that promised more than what was taken.
    better = promise > np.where(some, promise[np.arange(len(row)), best], -np.inf)[:, None]
    assert screened_out == better.sum() == (better & ~valid).sum()


def test_without_a_direction_the_first_valid_draw_is_taken() -> None:
    """Where nothing is known of directions, a slot takes its draws in order: the first that passes."""
    sources = planted_sources()
    wanted = round_allocation(sources, 5, screen=True)
    found, screened_out = drawn(sources, wanted, screening=HALF)
    _, draw, _, z = slots_of(sources, wanted)
    valid = z[..., 1] > 0
    first, some = valid.argmax(axis=1), valid.any(axis=1)
    np.testing.assert_array_equal(found.draw, draw[some, first[some]])
    assert screened_out == np.where(some, first, CANDIDATES).sum()


@given(
    valid=st.lists(st.lists(st.booleans(), min_size=CANDIDATES, max_size=CANDIDATES), max_size=20),
    tested_at_once=st.integers(1, CANDIDATES + 1),
)
def test_the_first_that_passes_is_taken_however_many_are_asked_at_once(
    valid: list[list[bool]], tested_at_once: int
) -> None:
    """The chosen draw and the number of failed ones do not depend on the size of the screened groups."""
    passing = np.array(valid, bool).reshape(-1, CANDIDATES)
    order = np.random.default_rng(0).permuted(np.arange(passing.size).reshape(passing.shape), axis=1)
    asked: list[int] = []

    def passes(entries: Tensor) -> Tensor:
        asked.extend(entries.tolist())
        return torch.from_numpy(passing.ravel())[entries]

    taken, failed = first_passing(torch.from_numpy(order), passes, tested_at_once=tested_at_once)
    in_order = passing.ravel()[order]
    some = in_order.any(axis=1)
    first = np.where(some, in_order.argmax(axis=1), CANDIDATES)
    assert taken.tolist() == order[some, first[some]].tolist()
    assert failed == first.sum()
    assert len(asked) == len(set(asked))
    needed = np.minimum(first + 1, CANDIDATES)  # of each row
    assert len(asked) == np.minimum(-(-needed // tested_at_once) * tested_at_once, CANDIDATES).sum()


def test_nothing_is_decoded_where_nothing_is_valid() -> None:
    """A slot none of whose draws passes is not decoded, and all of them are counted as screened out."""
    sources = planted_sources(6)
    nothing = rule(lambda z: torch.zeros(len(z), dtype=torch.bool))
    found, screened_out = drawn(
        sources, round_allocation(sources, 4, directions=DIRECTIONS, screen=True), screening=nothing
    )
    assert (len(found.row), screened_out) == (0, 6 * 4 * CANDIDATES)


def test_screening_is_told_latent_label_and_radius() -> None:
    """A screening function gets the latent, its source's label and the length of its step."""
    sources = replace(planted_sources(), labels=np.arange(20) % 2)

    def near_and_of_class_one(z: Tensor, label: Tensor, radius: Tensor) -> Tensor:
        assert len(z) == len(label) == len(radius)
        return (radius < 0.6) & (label == 1)

    found, _ = drawn(sources, round_allocation(sources, screen=True), screening=near_and_of_class_one)
    assert len(found.row) > 20
    assert (found.row % 2 == 1).all()
    assert radius_sd(found.latent, sources.mu[found.row], SD).max() < 0.6


@given(
    decodes=st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any),
    border=st.integers(0, 6),
    batch_size=st.integers(1, 40),
    screen=st.booleans(),
)
def test_shards_and_batches_change_no_draw(decodes: list[int], border: int, batch_size: int, screen: bool) -> None:
    """The draws of a source do not depend on other sources, nor on the batch size."""
    sources = planted_sources(6)
    wanted = round_allocation(sources, np.array(decodes), directions=DIRECTIONS, screen=screen)
    whole, screened_out = drawn(sources, wanted, replace(NOISE_MODEL, batch_size=1000), HALF)
    parts, left_out = [], 0
    for rows in (slice(border), slice(border, None)):
        makers = draw_perturbations(
            cut(sources, rows), cut(wanted, rows), replace(NOISE_MODEL, batch_size=batch_size), SD, HALF, CPU
        )
        for part, out in (make() for make in makers):
            parts.append((sources.index[rows][part.row], part.draw, part.latent))
            left_out += out
    expected = (sources.index[whole.row], whole.draw, whole.latent)
    for arrays, want in zip(zip(*parts, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(arrays), want)
    assert left_out == screened_out


@given(sizes=st.lists(st.integers(0, 7), max_size=8), size=st.integers(1, 9))
def test_batches_are_filled_and_nothing_is_lost(sizes: list[int], size: int) -> None:
    """Draws of any parts come in full batches, in order; only the last one may be smaller, and none is empty."""
    rows = np.arange(sum(sizes))
    numbers = torch.from_numpy(rows)
    whole = PerturbationBatch.of(row=numbers, draw=numbers + 1, eps=numbers[:, None] + 2.0, z=numbers[:, None] + 3.0)
    ends = np.cumsum(sizes, dtype=int)
    batches = list(rebatched([whole.take(slice(end - n, end)) for n, end in zip(sizes, ends, strict=True)], size))
    lengths = [len(batch.row) for batch in batches]
    assert lengths[:-1] == [size] * (len(batches) - 1)
    assert all(0 < length <= size for length in lengths)
    for name in ("row", "draw", "eps", "latent", "z"):
        got = np.concatenate([getattr(batch, name) for batch in batches] or [getattr(whole, name)])
        np.testing.assert_array_equal(got, getattr(whole, name))


def test_no_draw_is_taken_twice() -> None:
    """Slots of a source share no draw, and another round draws anew."""
    sources = planted_sources()
    first, second = (
        drawn(sources, round_allocation(sources, round_=round_, directions=DIRECTIONS, screen=True))[0]
        for round_ in (1, 2)
    )
    assert len(set(zip(first.row, first.draw, strict=True))) == len(first.row) == 20 * 12
    assert np.abs(first.eps - second.eps).min() > 0
