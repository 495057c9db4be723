"""A component that seems to hide two is divided, and stays so if the bound is higher some iterations later.

Ueda et al., SMEM algorithm for mixture models (Neural Computation 2000).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.distiller.mixture.expectation import alive_components
from services.distiller.mixture.fitting import Fit, State
from services.distiller.mixture.merges import merge
from services.distiller.mixture.points import Chunk
from services.distiller.mixture.posterior import FILLED, Posterior, Prior, Sums, empty_bound
from services.distiller.mixture.screening import asker
from services.distiller.mixture.starts import drawn

# Points that splits are looked for in.
_SAMPLE = 20_000
# Fewer points of a component are not divided.
_LEAST_POINTS = 4
_LLOYD_STEPS = 12
# Iterations that a split is given to prove itself.
TRIAL = 4


def split(fit: Fit, state: State, generator: torch.Generator, *, share: float) -> bool:
    """Divide components that seem to hide two, and keep the change if the bound is higher a few iterations later.

    Of those that promise anything, the most promising `share` is divided.
    """
    if fit.prior.kind == "tied":
        return False
    halves = _halved(_sampled(fit, state.posterior), state, generator)
    if not halves:
        return False
    halves = halves[: math.ceil(share * len(halves))]
    divided = Posterior.of(_divided(state.sums, halves), fit.prior)
    trial = replace(state, posterior=divided, blocks=list(state.blocks), bounds=list(state.bounds))
    for _ in range(TRIAL):
        fit.step(trial)
    while merge(fit, trial):
        pass
    if trial.bound <= state.bound:
        return False
    vars(state).update(vars(trial))
    return True


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Points (s, d), their categories, and the component of each, (s,)."""

    x: Tensor
    categories: list[Tensor]
    labels: Tensor

    def take(self, rows: Tensor) -> "_Sample":
        return _Sample(
            x=self.x[rows], categories=[values[rows] for values in self.categories], labels=self.labels[rows]
        )

    def of(self, component: int) -> "_Sample":
        return self.take(self.labels == component)


def _sampled(fit: Fit, posterior: Posterior) -> _Sample:
    """Return points taken evenly from those of all processes."""
    few = fit.points.thinned(max(fit.count // _SAMPLE, 1))
    ask = asker(posterior)
    alive = alive_components(posterior)

    def work(chunk: Chunk) -> tuple[Chunk, Tensor]:
        return chunk, alive[ask(chunk).responsibility.argmax(dim=1)]

    found = list(fit.crew.each(work, few.makers()))
    categories = [torch.cat(values) for values in zip(*(chunk.categories for chunk, _ in found), strict=True)]
    return _Sample(
        x=fit.crew.gathered(torch.cat([chunk.x for chunk, _ in found])),
        categories=[fit.crew.gathered(values) for values in categories],
        labels=fit.crew.gathered(torch.cat([label for _, label in found])),
    )


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """A component divided: the sums of both halves, and how much the bound would rise, nearly."""

    component: int
    sums: tuple[Sums, Sums]
    gain: float


def _halved(sample: _Sample, state: State, generator: torch.Generator) -> list[_Halves]:
    """Return the components that seem to hide two, the most rewarding first, as many as there are empty ones."""
    room = int((state.posterior.count < FILLED).sum())
    found = [
        halves
        for component in torch.unique(sample.labels).tolist()
        for halves in _ways(sample.of(component), component, state, generator)
    ]
    best: dict[int, _Halves] = {}
    for halves in sorted(found, key=lambda halves: -halves.gain):
        if halves.gain > 0:
            best.setdefault(halves.component, halves)
    return list(best.values())[:room]


def _ways(own: _Sample, component: int, state: State, generator: torch.Generator) -> Iterator[_Halves]:
    """Yield ways to divide the points of one component."""
    count, prior = len(own.x), state.posterior.prior
    if count < _LEAST_POINTS:
        return
    scale = float(state.posterior.count[component]) / count
    whole = _hard_sums(own, prior, state.sums, scale)
    for side in _cuts(own.x, state.posterior, component, generator):
        if 1 < int(side.sum()) < count - 1:
            first, second = (_hard_sums(own.take(part), prior, state.sums, scale) for part in (side, ~side))
            yield _Halves(component=component, sums=(first, second), gain=_gain(whole, first, second, prior))


def _gain(whole: Sums, first: Sums, second: Sums, prior: Prior) -> float:
    three = _stacked([whole, first, second])
    # Sticks say nothing of three that do not stand beside each other: weights are judged by their entropy.
    bounds = Posterior.of(three, replace(prior, process=False)).component_bounds(three)
    shares = torch.xlogy(three.count, three.count)
    return float(bounds[1:].sum() - bounds[0] + shares[1:].sum() - shares[0]) - empty_bound(whole, prior)


def _cuts(x: Tensor, posterior: Posterior, component: int, generator: torch.Generator) -> list[Tensor]:
    """Return ways to cut points (m, d) of one component in two, (m,) bool each."""
    root = posterior.prior.shape.expand(posterior.root[component : component + 1])[0]
    own = (x - posterior.mean[component]) @ root
    centred = x - x.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    cuts = [_two_means(centred, (centred @ axis) > 0)]
    for _ in range(2):
        first = own[int(torch.randint(len(own), (1,), generator=generator))]
        distance = ((own - first) ** 2).sum(dim=1)
        second = own[drawn(distance, generator)] if float(distance.sum()) > 0 else first
        cuts.append(_two_means(own, ((own - second) ** 2).sum(dim=1) < distance))
    return cuts


def _two_means(x: Tensor, side: Tensor) -> Tensor:
    """Return the sides of points (m, d) after Lloyd's algorithm, begun from some."""
    for _ in range(_LLOYD_STEPS):
        if not 0 < int(side.sum()) < len(side):
            return side
        a, b = x[side].mean(dim=0), x[~side].mean(dim=0)
        new = ((x - a) ** 2).sum(dim=1) < ((x - b) ** 2).sum(dim=1)
        if bool((new == side).all()):
            break
        side = new
    return side


def _hard_sums(sample: _Sample, prior: Prior, like: Sums, scale: float) -> Sums:
    """Return the sums of one component that has all points of a sample, times `scale`."""
    counts = [
        torch.bincount(values, minlength=len(whole)).to(sample.x.dtype)[:, None] * scale
        for values, whole in zip(sample.categories, like.categories, strict=True)
    ]
    features = prior.shape.features(sample.x).sum(dim=0, keepdim=True) * scale
    return replace(like, features=features, categories=counts)


def _stacked(sums: list[Sums]) -> Sums:
    return replace(
        sums[0],
        features=torch.cat([part.features for part in sums]),
        categories=[torch.cat(parts, dim=1) for parts in zip(*(part.categories for part in sums), strict=True)],
    )


def _divided(sums: Sums, halves: list[_Halves]) -> Sums:
    """Return sums in which the first half takes a component's place and the second that of an empty one."""
    features, categories = sums.features.clone(), [category.clone() for category in sums.categories]
    empty = (sums.count < FILLED).nonzero()[:, 0].tolist()
    for half, other in zip(halves, empty, strict=False):
        for place, part in zip((half.component, other), half.sums, strict=True):
            features[place] = part.features[0]
            for category, counts in zip(categories, part.categories, strict=True):
                category[:, place] = counts[:, 0]
    return replace(sums, features=features, categories=categories)
