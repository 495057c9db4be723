"""Perturbations of sources: `z = mu + r * sd_agg * eps`.

The noise eps ~ N(0, I) is a pure function of (seed, source, round, draw). Results therefore do not depend on how
sources are split into shards and batches, nor on the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.arrays import Array
from services.generator import noise
from services.generator.codec import as_array
from services.generator.validity import Thresholds, radius_sd
from services.latent_space.rendering import SourceImages

# Draws of one slot, of which the most promising one is decoded, once the plan has a direction.
CANDIDATES = 4
# Batches of slots that one task screens at once: fewer, larger calls of the label model.
_BATCHES_OF_SLOTS = 4

Screening = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents (n, d), their labels and radii (n,) -> which are worth decoding, (n,) bool, all on the device that draws."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class NoiseModel:
    """The distribution of steps, and the largest number of failures per source."""

    seed: int
    # Standard deviation of a step in aggregate latent standard deviations.
    radius_sd: float
    # Use the noise of the authors' released code; `radius_sd` then has no effect.
    released: bool = False
    max_failures_per_source: int
    batch_size: int

    def step(self, eps: Tensor, sd_agg: Tensor) -> Tensor:
        """Return the displacement (n, d) of noise (n, d)."""
        return eps if self.released else self.radius_sd * sd_agg * eps

    def noise(self, *, source: Tensor, round_: int, draw: Tensor, dim: int) -> Tensor:
        noise_model = noise.released_noise if self.released else noise.standard_normal
        return noise_model(seed=self.seed, source=source, round_=round_, draw=draw, dim=dim)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The n real images to search around, as arrays."""

    # (n,) position in the split
    index: Array
    # (n,) class ids
    labels: Array
    # (n, d) posterior means
    mu: Array
    # (n,) bool: kept out of correction
    held_out: Array
    # (N, h, w, c) uint8, all images of the split
    images: Array

    @property
    def source_images(self) -> SourceImages:
        return SourceImages(row=self.index, mu=self.mu, images=self.images)


@dataclass(frozen=True, kw_only=True)
class RoundAllocation:
    """The plan of one shard in one round, as arrays over sources."""

    round_: int
    # (n,) perturbations to decode
    decodes: Array
    # (n,) failures of earlier rounds
    found: Array
    # (n,) margins of the unperturbed reconstructions
    reconstruction_margin: Array
    # (k, d) for each class the direction in which margins rise; None prefers no draw
    directions: Array | None = None
    # Leave out draws that the label model rules out.
    screen: bool = False


@dataclass(frozen=True, kw_only=True)
class PerturbationBatch:
    """The b perturbations of one batch.

    Arrays are on the host, except the latents z on their device.
    """

    row: Array  # position in the shard
    draw: Array
    eps: Array  # (b, d)
    latent: Array  # (b, d), the same as z
    z: Tensor  # (b, d)

    @classmethod
    def of(cls, *, row: Tensor, draw: Tensor, eps: Tensor, z: Tensor) -> "PerturbationBatch":
        """Return a batch with everything that the host needs copied at once.

        Every copy waits for all earlier work of the device.
        """
        return cls(z=z, row=as_array(row), draw=as_array(draw), eps=as_array(eps), latent=as_array(z))

    def take(self, rows: slice) -> "PerturbationBatch":
        return PerturbationBatch(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def __add__(self, other: "PerturbationBatch") -> "PerturbationBatch":
        return PerturbationBatch(
            **{field.name: _joined(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        )


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """The data of a shard on the device that draws."""

    noise_model: NoiseModel
    round_: int
    screen: bool
    screening: Screening | None
    mu: Tensor  # (n, d)
    source: Tensor  # (n,)
    labels: Tensor  # (n,)
    sd_agg: Tensor  # (d,)
    directions: Tensor | None  # (k, d)


def perturbations(
    noise_model: NoiseModel,
    sd_agg: Array,
    *,
    mu: Array,
    source: Array,
    round_: int,
    draw: Array,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return noise and latents (n, d) of perturbations, given their identities.

    Both are on the device.
    """
    return _perturb(
        noise_model,
        _on(device, sd_agg),
        mu=_on(device, mu),
        source=_on(device, source),
        round_=round_,
        draw=_on(device, draw),
    )


def draw_perturbations(
    sources: Sources,
    round_allocation: RoundAllocation,
    noise_model: NoiseModel,
    sd_agg: Array,
    screening: Screening | None,
    device: torch.device,
) -> Iterator[Callable[[], tuple[PerturbationBatch, int]]]:
    """Yield tasks that draw the perturbations to decode, in source order.

    A task returns a batch and the number of draws that were screened out. Each decode
    has a slot of draws of its own: one draw, or several when the plan screens, of which
    the most promising valid one is decoded. A slot without a valid draw is not decoded,
    so tasks return different numbers of draws.
    """
    rows = np.repeat(np.arange(len(sources.index)), round_allocation.decodes)  # (slots,)
    slots = np.arange(len(rows)) - np.repeat(
        np.cumsum(round_allocation.decodes) - round_allocation.decodes, round_allocation.decodes
    )
    shard = _Shard(
        noise_model=noise_model,
        round_=round_allocation.round_,
        screen=round_allocation.screen,
        screening=screening,
        mu=_on(device, sources.mu),
        source=_on(device, sources.index),
        labels=_on(device, sources.labels).long(),
        sd_agg=_on(device, sd_agg),
        directions=None if round_allocation.directions is None else _on(device, round_allocation.directions),
    )
    row, slot = _on(device, rows), _on(device, slots)
    size = _BATCHES_OF_SLOTS * noise_model.batch_size
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        yield partial(_draw_slots, shard, row[part], slot[part])


def rebatched(parts: Iterable[PerturbationBatch], size: int) -> Iterator[PerturbationBatch]:
    """Yield the same draws in batches of `size`, the last one smaller."""
    rest: PerturbationBatch | None = None
    for part in parts:
        rest = part if rest is None else rest + part
        while len(rest.row) >= size:
            yield rest.take(slice(size))
            rest = rest.take(slice(size, None))
    if rest is not None and len(rest.row):
        yield rest


def screening_by(thresholds: Thresholds, *, label_probability: Callable[[Tensor, Tensor], Tensor] | None) -> Screening:
    """Return the test of latents that are worth rendering.

    It uses the label model, the only signal that is both cheap and decisive, and the radius alone when the label model
    reads images.
    """

    def passes(z: Tensor, label: Tensor, radius: Tensor) -> Tensor:
        near = radius <= thresholds.max_radius_sd
        if label_probability is None:
            return near
        return near & (label_probability(z, label) >= thresholds.min_label_probability)

    return passes


def first_passing(order: Tensor, passes: Callable[[Tensor], Tensor], *, tested_at_once: int) -> tuple[Tensor, int]:
    """Return the first passing entry of each row of `order` (slots, k).

    Results are ascending in rows, and rows without a passing entry are left out. Also returns the number of entries
    that failed before. `passes` tests entries (m,). It is called for `tested_at_once` columns at a time, and for later
    columns only in rows without an earlier passing entry.
    """
    width = order.shape[1]
    failed = torch.zeros(len(order), dtype=torch.int64, device=order.device)  # (slots,) entries before the one to take
    for begin in range(0, width, tested_at_once):
        open_ = (failed == begin).nonzero()[:, 0]
        tried = order[open_, begin : begin + tested_at_once]
        out = ~passes(tried.flatten()).view(tried.shape)
        failed[open_] += out.cumprod(dim=1).sum(dim=1)
    rows = (failed < width).nonzero()[:, 0]
    return order[rows, failed[rows]], int(failed.sum())


def _perturb(
    noise_model: NoiseModel, sd_agg: Tensor, *, mu: Tensor, source: Tensor, round_: int, draw: Tensor
) -> tuple[Tensor, Tensor]:
    eps = noise_model.noise(source=source, round_=round_, draw=draw, dim=mu.shape[1])
    return eps, (mu + noise_model.step(eps, sd_agg)).float()


def _draw_slots(shard: _Shard, row: Tensor, slot: Tensor) -> tuple[PerturbationBatch, int]:
    width = CANDIDATES if shard.screen else 1
    draw = (slot[:, None] * width + torch.arange(width, device=slot.device)).flatten()  # (slots * width,)
    wide = row.repeat_interleave(width)
    mu, source = shard.mu.index_select(0, wide), shard.source[wide]
    eps, z = _perturb(shard.noise_model, shard.sd_agg, mu=mu, source=source, round_=shard.round_, draw=draw)
    if not shard.screen:
        return PerturbationBatch.of(row=wide, draw=draw, eps=eps, z=z), 0
    chosen, screened_out = _choose_draws(shard, shard.labels[wide], eps, z, radius_sd(z, mu, shard.sd_agg))
    return PerturbationBatch.of(row=wide[chosen], draw=draw[chosen], eps=eps[chosen], z=z[chosen]), screened_out


def _choose_draws(shard: _Shard, labels: Tensor, eps: Tensor, z: Tensor, radius: Tensor) -> tuple[Tensor, int]:
    """Return each slot's most promising passing draw, ascending.

    Also returns the number of draws that were screened out.
    """

    def passes(tried: Tensor) -> Tensor:
        if shard.screening is None:
            return torch.ones_like(tried, dtype=torch.bool)
        return shard.screening(z.index_select(0, tried), labels[tried], radius[tried])

    # On a CPU each tested latent costs, on a GPU each call.
    tested_at_once = 1 if z.device.type == "cpu" else CANDIDATES
    return first_passing(_by_promise(shard, labels, eps), passes, tested_at_once=tested_at_once)


def _by_promise(shard: _Shard, labels: Tensor, eps: Tensor) -> Tensor:
    """Return the positions (slots, CANDIDATES) of draws, the most promising first.

    The most promising draw goes furthest against its class's direction, in which margins rise.
    """
    positions = torch.arange(len(eps), device=eps.device).view(-1, CANDIDATES)
    if shard.directions is None:
        return positions
    rise = (eps * shard.directions.index_select(0, labels)).sum(dim=1).view(-1, CANDIDATES)
    return positions.gather(1, rise.argsort(dim=1, stable=True))


def _joined(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else np.concatenate([first, second])


def _on(device: torch.device, array: Array) -> Tensor:
    return torch.tensor(array, device=device)  # a copy: torch warns of read-only arrays
