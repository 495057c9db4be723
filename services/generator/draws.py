"""Which perturbations of which sources are decoded: `z = mu + r * sd_agg * eps`, eps ~ N(0, I).

Every eps is a pure function of (seed, source, round, draw): nothing that is found depends on how the sources are cut
into shards and batches, nor on how many workers share them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from services.generator import noise
from services.generator.failures import Array
from services.generator.validity import radius_sd

# Of so many draws the one that leads most towards a failure is decoded, once the plan knows a direction.
CANDIDATES = 4
# Batches whose slots one maker looks at: the label model is asked in larger batches, for fewer calls.
_BATCHES_OF_SLOTS = 4

Screening = Callable[[Array, Array, Array], Array]
"""Latents (n, d), their labels and radii (n,) -> which are worth decoding, (n,) bool."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """How a step is drawn, and how many failures of a source count."""

    seed: int
    # Standard deviation of a step in aggregate latent standard deviations.
    radius_sd: float
    # Noise of the authors' released code instead; `radius_sd` has no effect then.
    released: bool = False
    max_failures_per_source: int
    batch_size: int

    def step(self, eps: Array, sd_agg: Array) -> Array:
        """Return the displacement (n, d) that noise (n, d) means."""
        return eps if self.released else self.radius_sd * sd_agg * eps

    def noise(self, *, source: Array, round_: int, draw: Array, dim: int) -> Array:
        law = noise.released if self.released else noise.standard_normal
        return np.asarray(law(seed=self.seed, source=source, round_=round_, draw=draw, dim=dim))


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Real images to search around, as arrays over n sources."""

    # (n,) position in the split
    index: Array
    # (n,) class ids
    labels: Array
    # (n, d) posterior means
    mu: Array
    # (n,) bool: kept out of correction
    held_out: Array


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a plan says of one shard in one round, as arrays over its n sources."""

    round_: int
    # (n,) perturbations to decode
    decodes: Array
    # (n,) failures of earlier rounds
    found: Array
    # (n,) margins of the unperturbed reconstructions
    reconstruction_margin: Array
    # (k, d) for each class the direction in which margins rise; None chooses no draw over another
    directions: Array | None = None
    # Draws that the label model rules out are not decoded.
    screen: bool = False


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Perturbations of one batch, as arrays over its rows."""

    row: Array  # position in the shard
    draw: Array
    eps: Array  # (b, d)
    z: Array  # (b, d)

    def take(self, rows: Array | slice) -> "Draws":
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def __add__(self, other: "Draws") -> "Draws":
        return Draws(
            **{
                field.name: np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            }
        )


def perturbations(
    law: Law, sd_agg: Array, *, mu: Array, source: Array, round_: int, draw: Array
) -> tuple[Array, Array]:
    """Return noise and latents, both (n, d), of perturbations known by their identity alone."""
    eps = law.noise(source=source, round_=round_, draw=draw, dim=mu.shape[1])
    return eps, (mu + law.step(eps, sd_agg)).astype(np.float32)


def draws(
    sources: Sources, orders: Orders, law: Law, sd_agg: Array, screening: Screening | None
) -> Iterator[Callable[[], tuple[Draws, int]]]:
    """Yield makers of the perturbations to decode, in source order, and of how many were screened out on the way.

    Each decode has a slot of draws of its own: one, or where the plan knows better than chance which to take, several,
    of which the most promising valid one is decoded. A slot without a valid draw is not decoded, so that makers make
    different numbers of draws.
    """
    rows = np.repeat(np.arange(len(sources.index)), orders.decodes)  # (slots,)
    slot = np.arange(len(rows)) - np.repeat(np.cumsum(orders.decodes) - orders.decodes, orders.decodes)
    size = _BATCHES_OF_SLOTS * law.batch_size
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        yield partial(_slots, sources, orders, law, sd_agg, screening, rows[part], slot[part])


def filled(parts: Iterable[Draws], size: int) -> Iterator[Draws]:
    """Yield the same draws in batches of `size`, the rest at the end."""
    rest: Draws | None = None
    for part in parts:
        rest = part if rest is None else rest + part
        while len(rest.row) >= size:
            yield rest.take(slice(size))
            rest = rest.take(slice(size, None))
    if rest is not None and len(rest.row):
        yield rest


def _slots(
    sources: Sources,
    orders: Orders,
    law: Law,
    sd_agg: Array,
    screening: Screening | None,
    row: Array,
    slot: Array,
) -> tuple[Draws, int]:
    width = CANDIDATES if orders.screen else 1
    draw = (slot[:, None] * width + np.arange(width)).ravel()  # (slots * width,)
    wide = np.repeat(row, width)
    eps, z = perturbations(
        law, sd_agg, mu=sources.mu[wide], source=sources.index[wide], round_=orders.round_, draw=draw
    )
    drawn = Draws(row=wide, draw=draw, eps=eps, z=z)
    if width == 1:
        return drawn, 0
    chosen, screened_out = _chosen(sources, orders, sd_agg, screening, wide, eps, z)
    return drawn.take(chosen), screened_out


def _chosen(
    sources: Sources,
    orders: Orders,
    sd_agg: Array,
    screening: Screening | None,
    row: Array,
    eps: Array,
    z: Array,
) -> tuple[Array, int]:
    """Return for each slot the position of its most promising draw that passes, ascending, and how many did not."""
    radius = radius_sd(z, sources.mu[row], sd_agg)
    promise = np.zeros(len(row)) if orders.directions is None else _promise(eps, orders.directions, sources.labels[row])
    order = np.argsort(-promise.reshape(-1, CANDIDATES), axis=1, kind="stable")  # (slots, CANDIDATES)
    positions = np.take_along_axis(np.arange(len(row)).reshape(-1, CANDIDATES), order, axis=1)
    chosen, screened_out = np.full(len(positions), -1), 0
    for rank in range(CANDIDATES):  # the label model is asked for the next best only where the better ones failed
        open_ = np.flatnonzero(chosen < 0)
        tried = positions[open_, rank]
        passed = _all(tried) if screening is None else screening(z[tried], sources.labels[row[tried]], radius[tried])
        screened_out += int((~passed).sum())
        chosen[open_[passed]] = tried[passed]
    return chosen[chosen >= 0], screened_out


def _all(rows: Array) -> Array:
    return np.ones(len(rows), bool)


def _promise(eps: Array, directions: Array, labels: Array) -> Array:
    """Return how far each step leads against its class's direction, in which margins rise."""
    return np.asarray(-np.einsum("nd,nd->n", eps, directions[labels]))
