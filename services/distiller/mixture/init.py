"""The initialisation of a fit: components by k-means++, k-means, or at random."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from services.distiller.mixture.data import Chunk
from services.distiller.mixture.fit_state import Fit
from services.distiller.mixture.posterior import Sums

Start = Literal["kmeans", "k-means++", "random_from_data", "random"]
# Points among which centres are chosen.
_SAMPLE = 50_000
_LLOYD_STEPS = 10


def initial_sums(fit: Fit, start: Start, generator: torch.Generator) -> list[Sums]:
    """Return the sums of the initial responsibilities, block by block.

    `k-means++` (Arthur and Vassilvitskii, SODA 2007) chooses distant centres, `kmeans` improves them by Lloyd's
    algorithm, and `random_from_data` takes random points. Each point then belongs to the nearest centre. `random` draws
    responsibilities.
    """
    if start == "random":
        return [_block(fit, rows, _random(fit, generator)) for rows in fit.blocks]
    sample = _sampled(fit)
    count = min(fit.prior.components, len(sample))
    if start == "random_from_data":
        centres = sample[torch.randperm(len(sample), generator=generator)[:count]]
    else:
        centres = _far_apart(sample, count, generator)
    for _ in range(_LLOYD_STEPS if start == "kmeans" else 0):
        centres = _lloyd_means(sample, centres)
    return [_block(fit, rows, lambda chunk: _one_hot(fit, _nearest(chunk.x, centres))) for rows in fit.blocks]


def given_sums(fit: Fit, responsibilities: Tensor) -> list[Sums]:
    """Return the sums of given responsibilities (n, K) of this process's points."""
    position = 0

    def of(chunk: Chunk) -> Tensor:
        nonlocal position
        initial_sums, position = position, position + len(chunk.x)
        return responsibilities[initial_sums:position].to(chunk.x.device)

    return [_block(fit, rows, of) for rows in fit.blocks]


def _block(fit: Fit, rows: slice, of: Callable[[Chunk], Tensor]) -> Sums:
    prior, total = fit.prior, fit.no_sums()
    for make in fit.points.makers(rows):
        chunk = make()
        share = of(chunk)  # (b, K)
        counts = [
            torch.zeros_like(whole).index_add_(0, values, share)
            for whole, values in zip(total.categories, chunk.categories, strict=True)
        ]
        scatter = chunk.x.T @ chunk.x if prior.kind == "tied" else torch.zeros_like(total.scatter)
        entropy = -torch.xlogy(share, share).sum()
        total = total + total.of([share.T @ prior.shape.features(chunk.x), scatter, entropy, *counts])
    return total.of(fit.reducer.total(total.parts()))


def _random(fit: Fit, generator: torch.Generator) -> Callable[[Chunk], Tensor]:
    def of(chunk: Chunk) -> Tensor:
        share = torch.rand(len(chunk.x), fit.prior.components, generator=generator, dtype=torch.float64)
        return (share / share.sum(dim=1, keepdim=True)).to(chunk.x.device)

    return of


def _sampled(fit: Fit) -> Tensor:
    """Return points (s, d) taken evenly from those of all processes."""
    few = fit.points.strided(max(fit.count // _SAMPLE, 1))
    return fit.reducer.gather(few.read(slice(None)).x)


def _far_apart(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose centres (count, d) among points (s, d) by k-means++.

    Each is drawn with a probability proportional to its squared distance from the centres before it.
    """
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [first]
    distance = ((x - x[first]) ** 2).sum(dim=1)
    for _ in range(count - 1):
        if float(distance.sum()) <= 0:  # fewer different points than centres
            break
        new = draw_weighted(distance, generator)
        chosen.append(new)
        distance = torch.minimum(distance, ((x - x[new]) ** 2).sum(dim=1))
    return x[chosen]


def draw_weighted(weight: Tensor, generator: torch.Generator) -> int:
    """Draw a position with probability proportional to weights (n,).

    The generator is on the CPU, whatever the device of the weights.
    """
    draw = torch.rand(1, generator=generator, dtype=torch.float64).to(weight.device)
    cumulated = weight.cumsum(0)
    return int(torch.searchsorted(cumulated, draw * cumulated[-1]).clamp_max(len(weight) - 1))


def _lloyd_means(x: Tensor, centres: Tensor) -> Tensor:
    """Return the means of the points (s, d) nearest to each centre.

    A centre without points stays where it is.
    """
    label = _nearest(x, centres)
    count = torch.bincount(label, minlength=len(centres)).to(x.dtype)[:, None]
    sums = torch.zeros_like(centres).index_add_(0, label, x)
    return torch.where(count > 0, sums / count.clamp_min(1.0), centres)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return ((centres**2).sum(dim=1) - 2 * x @ centres.T).argmin(dim=1)


def _one_hot(fit: Fit, label: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(label, fit.prior.components).to(torch.float64)
