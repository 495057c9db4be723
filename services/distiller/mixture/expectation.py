"""The expectation step: how much of each point every component answers for, and the sums of that.

`dense` asks every component about every point: two matrix products. Where points have many dimensions, most components
are so far from a point that their share of it is no number; `Screen` finds those from a few dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.distiller.mixture.points import Chunk
from services.distiller.mixture.posterior import Posterior, Sums

# Fewer points than this in all: a component is not asked any more.
NOTHING = 1e-10


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What is asked of a posterior in one pass over the data: the components that are alive."""

    posterior: Posterior
    alive: Tensor  # (a,) components
    coefficients: Tensor  # (f, a)
    log_categories: Sequence[Tensor]  # (c, a) each

    @classmethod
    def of(cls, posterior: Posterior) -> "Lookup":
        alive = alive_components(posterior)
        coefficients = posterior.coefficients()[:, alive]
        return cls(
            posterior=posterior,
            alive=alive,
            coefficients=coefficients.contiguous(),
            log_categories=[table[:, alive].contiguous() for table in posterior.log_categories],
        )

    def log_joint(self, features: Tensor, categories: Sequence[Tensor]) -> Tensor:
        """Return E[log pi + log p(point)] of every point and component that is alive, (b, a), but for common terms."""
        joint = features @ self.coefficients
        for table, values in zip(self.log_categories, categories, strict=True):
            joint += table[values]
        return joint


def alive_components(posterior: Posterior) -> Tensor:
    """Return the components that answer for points, and the likeliest of the others.

    An empty component is like every other: where the likeliest of them gets nothing, none would.
    """
    is_alive = posterior.count > NOTHING
    if not bool(is_alive.all()):
        weight = posterior.expected_log_weights().masked_fill(is_alive, -torch.inf)
        is_alive = is_alive.clone()
        is_alive[weight.argmax()] = True
    return is_alive.nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the components say of one chunk."""

    responsibility: Tensor  # (b, a)
    normaliser: Tensor  # (b,) log sums of the joints that the responsibilities were made of
    sums: Sums


def dense(chunk: Chunk, lookup: Lookup) -> Answer:
    """Ask every component that is alive about every point of a chunk."""
    features = lookup.posterior.prior.shape.features(chunk.x)
    joint = lookup.log_joint(features, chunk.categories)
    normaliser = normalise_(joint)
    sums = _summed(chunk, features, joint, normaliser, lookup)
    return Answer(responsibility=joint, normaliser=normaliser, sums=sums)


def normalise_(joint: Tensor) -> Tensor:
    """Turn log joints (b, a) into responsibilities in place; return their log sums, (b,)."""
    highest = joint.amax(dim=1, keepdim=True)
    joint.sub_(highest).exp_()
    total = joint.sum(dim=1, keepdim=True)
    joint.div_(total)
    return (highest + total.log())[:, 0]


def _summed(chunk: Chunk, features: Tensor, responsibility: Tensor, normaliser: Tensor, lookup: Lookup) -> Sums:
    """Return the sums of a chunk, given responsibilities (b, a) and the log sums (b,) that made them.

    -sum r log r is the log sums minus the responsibilities times the log joints, which are linear in the sums.
    """
    prior = lookup.posterior.prior
    found = responsibility.T @ features  # (a, f)
    counts = [
        torch.zeros(len(table), len(lookup.alive), dtype=found.dtype, device=found.device).index_add_(
            0, values, responsibility
        )
        for table, values in zip(lookup.log_categories, chunk.categories, strict=True)
    ]
    expected = (found * lookup.coefficients.T).sum()
    for count, table in zip(counts, lookup.log_categories, strict=True):
        expected += (count * table).sum()
    sums = Sums.none(prior.components, features.shape[1], prior.dim, [len(count) for count in counts], found.device)
    sums.features[lookup.alive] = found
    for whole, part in zip(sums.categories, counts, strict=True):
        whole[:, lookup.alive] = part
    scatter = chunk.x.T @ chunk.x if prior.kind == "tied" else sums.scatter
    return sums.of([sums.features, scatter, normaliser.sum() - expected, *sums.categories])
