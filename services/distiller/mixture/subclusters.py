"""Two sub-clusters inside every component, which a split would produce.

They are fitted to the component's own points by variational inference, on a sample, for all components in parallel
(after Chang and Fisher, Parallel sampling of DP mixture models using sub-cluster splits, NIPS 2013).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from services.distiller.mixture.data import Chunk
from services.distiller.mixture.e_step import alive_components, make_evaluator, normalise_
from services.distiller.mixture.fit_state import Fit, FitState
from services.distiller.mixture.init import draw_weighted
from services.distiller.mixture.parallel import Reducer
from services.distiller.mixture.posterior import LEAST_COUNT, SLACK, Posterior, Prior, Sums, empty_bound

# Assigns each point (m, d), also given standardised by its component, to a side, (m,) bool; draws by a generator.
Cut = Callable[[Tensor, Tensor, torch.Generator], Tensor]
# Points in which sub-clusters are searched.
_SAMPLE = 20_000
# Components with fewer points are not split.
_LEAST_POINTS = 8
# Random pairs of points that each component is also started from, beside its longest axis.
_PAIRS = 2
_LLOYD_STEPS = 12
_ITERATIONS = 8


@dataclass(frozen=True, kw_only=True)
class DividedComponent:
    """A split component.

    It has the sums of both sub-clusters, and the approximate rise of the bound.
    """

    component: int
    sums: Sums  # of two components
    gain: float


def divided_components(fit: Fit, state: FitState, generator: torch.Generator) -> list[DividedComponent]:
    """Return the components that may be split, by descending gain.

    The gain is the approximate rise of the bound.
    """
    parents = _parents(fit, state.posterior)
    best: dict[int, DividedComponent] = {}
    cuts: list[Cut] = [_longest_axis, *[_far_pair] * _PAIRS]
    for cut in cuts if parents else ():
        for divided in _fit_from_cut(_Inside(parents, state, fit.reducer), cut, generator):
            if divided.gain > (best[divided.component].gain if divided.component in best else -SLACK):
                best[divided.component] = divided
    return sorted(best.values(), key=lambda divided: -divided.gain)


@dataclass(frozen=True, kw_only=True)
class _Parent:
    """The sampled points of one component.

    Each point represents `scale` points of the data.
    """

    component: int
    chunk: Chunk
    scale: float


def _parents(fit: Fit, posterior: Posterior) -> list[_Parent]:
    """Return the components with their points in a sample.

    The sample is taken evenly from all processes.
    """
    few = fit.points.strided(max(fit.count // _SAMPLE, 1))
    ask, alive = make_evaluator(posterior), alive_components(posterior)

    def work(chunk: Chunk) -> tuple[Chunk, Tensor]:
        return chunk, alive[ask(chunk).responsibility.argmax(dim=1)]

    found = list(fit.reducer.each(work, few.makers()))
    x, labels, *categories = (
        fit.reducer.gather(torch.cat(parts))
        for parts in zip(*((chunk.x, label, *chunk.categories) for chunk, label in found), strict=True)
    )
    parents = []
    for component in torch.unique(labels).tolist():
        rows = (labels == component).nonzero()[:, 0]
        if len(rows) >= _LEAST_POINTS:
            chunk = Chunk(x=x[rows], categories=[values[rows] for values in categories])
            scale = float(posterior.count[component]) / len(rows)
            parents.append(_Parent(component=component, chunk=chunk, scale=scale))
    return parents


class _Inside:
    """A fit inside every component at once.

    The points of component i belong only to its two sub-clusters, 2 i and 2 i + 1.
    """

    def __init__(self, parents: Sequence[_Parent], state: FitState, reducer: Reducer) -> None:
        self.parents = parents
        self.state = state
        # Stick-breaking does not apply within components: weights are judged by their entropy.
        self.prior = replace(state.posterior.prior, process=False)
        self._reducer = reducer
        self._like = state.sums

    def begun(self, cut: Cut, generator: torch.Generator) -> tuple[Sums, Tensor]:
        """Return the result of `_summed` for the sides of a cut."""
        # A generator for each parent, so that the order of threads does not matter.
        seeds = torch.randint(2**62, (len(self.parents),), generator=generator).tolist()

        def share(parent: _Parent, _features: Tensor, pair: slice) -> Tensor:
            own = torch.Generator().manual_seed(seeds[pair.start // 2])
            side = cut(parent.chunk.x, self._standardised(parent), own)
            return torch.stack([side, ~side], dim=1).to(torch.float64)

        return self._summed(share)

    def expected(self, posterior: Posterior) -> tuple[Sums, Tensor]:
        """Return the result of `_summed` for a posterior of all sub-clusters."""
        coefficients = posterior.coefficients()

        def share(parent: _Parent, features: Tensor, pair: slice) -> Tensor:
            joint = features @ coefficients[:, pair]
            for table, values in zip(posterior.log_categories, parent.chunk.categories, strict=True):
                joint += table[:, pair][values]
            normalise_(joint)
            return joint

        return self._summed(share)

    def _summed(self, share_of: Callable[[_Parent, Tensor, slice], Tensor]) -> tuple[Sums, Tensor]:
        """Return the sums of all sub-clusters and the entropies (p,).

        The entropies are those of every parent's responsibilities. `share_of` maps a parent, its features (m, f) and
        the position of its sub-clusters to responsibilities (m, 2).
        """

        def work(numbered: tuple[int, _Parent]) -> tuple[Sums, Tensor]:
            number, parent = numbered
            features = self.prior.shape.features(parent.chunk.x)
            share = share_of(parent, features, slice(2 * number, 2 * number + 2))
            counts = [
                torch.zeros(len(whole), 2, dtype=share.dtype, device=share.device).index_add_(0, values, share)
                for whole, values in zip(self._like.categories, parent.chunk.categories, strict=True)
            ]
            sums = replace(
                self._like,
                features=share.T @ features * parent.scale,
                categories=[count * parent.scale for count in counts],
            )
            return sums, -torch.xlogy(share, share).sum() * parent.scale

        makers = (partial(lambda item: item, item) for item in enumerate(self.parents))
        found = list(self._reducer.each(work, makers))
        return _concatenated([sums for sums, _ in found]), torch.stack([entropy for _, entropy in found])

    def _standardised(self, parent: _Parent) -> Tensor:
        posterior, shape = self.state.posterior, self.prior.shape
        root = posterior.root if self.prior.kind == "tied" else posterior.root[parent.component : parent.component + 1]
        matrix = shape.expand(root).reshape(self.prior.dim, self.prior.dim)
        return (parent.chunk.x - posterior.mean[parent.component]) @ matrix


def _fit_from_cut(inside: _Inside, cut: Cut, generator: torch.Generator) -> list[DividedComponent]:
    """Return the sub-clusters of parents a few iterations after a cut.

    A parent is left out when one of its sub-clusters has lost its points.
    """
    sums, entropy = inside.begun(cut, generator)
    for _ in range(_ITERATIONS):
        sums, entropy = inside.expected(Posterior.of(sums, inside.prior))
    gains = _gain(sums, inside.prior) + entropy
    return [
        DividedComponent(
            component=parent.component,
            sums=sums.take(torch.arange(2 * number, 2 * number + 2)),
            gain=float(gains[number]),
        )
        for number, parent in enumerate(inside.parents)
        if float(sums.count[2 * number : 2 * number + 2].min()) >= 1
    ]


def _gain(children: Sums, prior: Prior) -> Tensor:
    """Return the approximate change (p,) of the bound by splits.

    The entropy is left out.
    """
    first, second = (children.take(torch.arange(begin, len(children.count), 2)) for begin in (0, 1))
    whole = first.of([a + b for a, b in zip(first.parts(), second.parts(), strict=True)])
    counts = torch.stack([first.count, second.count])
    weights = torch.xlogy(counts, counts).sum(dim=0) - torch.xlogy(whole.count, whole.count)
    if prior.kind == "tied":
        return weights + _tied_gain(first, second, Posterior.of(children, prior))
    three = [Posterior.of(part, prior).component_bounds(part) for part in (first, second, whole)]
    return weights + three[0] + three[1] - three[2] - empty_bound(children, prior)


def _tied_gain(first: Sums, second: Sums, posterior: Posterior) -> Tensor:
    """Return the result of `_gain` for tied covariances, without weights.

    A split explains the scatter between sub-clusters. This scatter is measured in units
    of the covariance that remains when all parents are split, so the result is
    optimistic: a shared covariance shrinks only as far as all splits together allow.
    """
    prior, count = posterior.prior, torch.stack([first.count, second.count]) + LEAST_COUNT
    means = torch.stack([first.features[:, 1:], second.features[:, 1:]]) / count[:, :, None]
    apart = (means[0] - means[1]) @ posterior.root
    scatter = count.prod(dim=0) / count.sum(dim=0) * (apart**2).sum(dim=1)
    known = prior.mean_precision + torch.cat([count, count.sum(dim=0, keepdim=True)])
    volume = known[0].log() + known[1].log() - known[2].log() - math.log(prior.mean_precision)
    return 0.5 * (scatter - prior.dim * volume)


def _concatenated(sums: Sequence[Sums]) -> Sums:
    """Return the components of several sums as one."""
    return replace(
        sums[0],
        features=torch.cat([part.features for part in sums]),
        categories=[torch.cat(parts, dim=1) for parts in zip(*(part.categories for part in sums), strict=True)],
    )


def _longest_axis(x: Tensor, _standardised: Tensor, _generator: torch.Generator) -> Tensor:
    """Return a side of each point (m, d), as (m,) bool.

    The sides are those of two means, started along the axis of most variance.
    """
    centred = x - x.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    return _two_means(centred, (centred @ axis) > 0)


def _far_pair(_x: Tensor, standardised: Tensor, generator: torch.Generator) -> Tensor:
    """Return a side of each point, as (m,) bool.

    The sides are those of two means, started from a random point and a distant one.
    """
    first = standardised[int(torch.randint(len(standardised), (1,), generator=generator))]
    distance = ((standardised - first) ** 2).sum(dim=1)
    second = standardised[draw_weighted(distance, generator)] if float(distance.sum()) > 0 else first
    return _two_means(standardised, ((standardised - second) ** 2).sum(dim=1) < distance)


def _two_means(x: Tensor, side: Tensor) -> Tensor:
    """Return the sides of points (m, d) after Lloyd's algorithm from given sides."""
    for _ in range(_LLOYD_STEPS):
        if not 0 < int(side.sum()) < len(side):
            return side
        a, b = x[side].mean(dim=0), x[~side].mean(dim=0)
        new = ((x - a) ** 2).sum(dim=1) < ((x - b) ** 2).sum(dim=1)
        if bool((new == side).all()):
            break
        side = new
    return side
