"""Moves that coordinate ascent cannot make: components that share points become one, one that hides two becomes two.

Coordinate ascent ends where it began: with several components in one cluster, or one in several. Merges are judged
exactly, by the bound of the merged responsibilities (Hughes and Sudderth 2013, 4.2); splits are tried and kept only if
the bound is higher some iterations later (Ueda et al., SMEM, Neural Computation 2000).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from services.distiller.mixture.expectation import alive_components
from services.distiller.mixture.fitting import Fit, State
from services.distiller.mixture.points import Chunk
from services.distiller.mixture.posterior import Posterior, Prior, Sums
from services.distiller.mixture.screening import asker

# A component is compared with so many others, those whose means it finds likeliest.
_NEIGHBOURS = 6
# How far the quick judgement of a merge may be off; the bound itself decides.
_SLACK = 10.0
# Points that splits are looked for in.
_SAMPLE = 20_000
_LLOYD_STEPS = 12
_MOST_ROUNDS = 6
# Where all splits together fail, the most promising ones are tried alone.
_SHARES = (1.0, 0.5, 0.2)
# Iterations that a split is given to prove itself.
_TRIAL = 4


def improve(fit: Fit, state: State, generator: torch.Generator) -> None:
    """Merge and split until neither raises the bound."""
    for _ in range(_MOST_ROUNDS):
        while merge(fit, state):
            pass
        order(state)
        for _ in range(_TRIAL):
            fit.step(state)
        if not any(split(fit, state, generator, share=share) for share in _SHARES):
            return


def merge(fit: Fit, state: State) -> bool:
    """Go once over the data, and make one component of every two that are better as one; say whether there were any."""
    pairs = _candidates(state)
    overlaps = torch.zeros(len(fit.blocks), len(pairs), dtype=torch.float64, device=pairs.device)
    ask = asker(state.posterior)
    alive = alive_components(state.posterior)
    column = torch.full((fit.prior.components,), -1, device=alive.device)
    column[alive] = torch.arange(len(alive), device=alive.device)

    def work(chunk: Chunk) -> tuple[Sums, Tensor]:
        answer = ask(chunk)
        return answer.sums, _overlap(answer.responsibility, column[pairs])

    for number, rows in enumerate(fit.blocks):
        found = list(fit.crew.each(work, fit.points.makers(rows)))
        sums = _total([part for part, _ in found])
        *parts, overlap = fit.crew.total([*sums.parts(), sum((part for _, part in found), overlaps[number])])
        state.blocks[number] = sums.of(parts)
        overlaps[number] = overlap
    return _merge_greedily(state, pairs, overlaps)


def order(state: State) -> None:
    """Put the largest components first, where sticks expect them, if the bound is the higher for it."""
    ranks = state.posterior.count.argsort(descending=True, stable=True)
    blocks = [block.take(ranks) for block in state.blocks]
    total = _total(blocks)
    posterior = Posterior.of(total, state.posterior.prior)
    if (bound := posterior.bound(total)) > state.bound:
        state.blocks, state.posterior, state.bound = blocks, posterior, bound


def split(fit: Fit, state: State, generator: torch.Generator, *, share: float) -> bool:
    """Divide components that seem to hide two, and keep the change if the bound is higher a few iterations later.

    Of those that promise anything, the most promising `share` is divided.
    """
    if fit.prior.kind == "tied":
        return False
    x, categories, labels = _sampled(fit, state.posterior)
    halves = _halved(x, categories, labels, state, generator)
    if not halves:
        return False
    halves = dict(list(halves.items())[: math.ceil(share * len(halves))])
    trial = State(posterior=Posterior.of(_divided(state.sums, halves), fit.prior), blocks=list(state.blocks), bound=0.0)
    for _ in range(_TRIAL):
        fit.step(trial)
    while merge(fit, trial):
        pass
    if trial.bound <= state.bound:
        return False
    state.posterior, state.blocks, state.bound = trial.posterior, trial.blocks, trial.bound
    return True


def _candidates(state: State) -> Tensor:
    """Return pairs (p, 2) of components that may be better as one: those that find each other's means likely."""
    posterior, sums = state.posterior, state.sums
    alive = (posterior.count > 1e-3).nonzero()[:, 0]
    if len(alive) < 2:
        return torch.zeros(0, 2, dtype=torch.int64, device=alive.device)
    shape, means = posterior.prior.shape, posterior.mean[alive]
    roots = posterior.root if posterior.prior.kind == "tied" else posterior.root[alive]
    likely = shape.features(means) @ shape.coefficients(means, roots)
    likely.fill_diagonal_(-torch.inf)
    nearest = likely.topk(min(_NEIGHBOURS, len(alive) - 1), dim=1).indices  # (a, m): whom each mean is likely under
    first = torch.arange(len(alive), device=alive.device)[:, None].expand_as(nearest)
    pairs = torch.stack([first, nearest], dim=-1).reshape(-1, 2).sort(dim=1).values
    pairs = alive[torch.unique(pairs, dim=0)]
    if posterior.prior.kind == "tied":
        return pairs
    gain = _gain(sums, pairs, posterior)
    return pairs[gain > -_SLACK]


def _gain(sums: Sums, pairs: Tensor, posterior: Posterior) -> Tensor:
    """Return how the bound would change where pairs (p, 2) that share no point became one, nearly; (p,)."""
    both = sums.take(pairs[:, 0])
    other = sums.take(pairs[:, 1])
    merged = replace(
        both,
        features=both.features + other.features,
        categories=[a + b for a, b in zip(both.categories, other.categories, strict=True)],
    )
    own = posterior.component_bounds(sums)
    none = Sums.none(
        1, sums.features.shape[1], posterior.prior.dim, [len(c) for c in sums.categories], sums.features.device
    )
    empty = Posterior.of(none, posterior.prior).component_bounds(none)
    components = Posterior.of(merged, posterior.prior).component_bounds(merged) + empty - own[pairs].sum(dim=1)
    counts = sums.count[pairs]  # (p, 2)
    weights = torch.xlogy(merged.count, merged.count) - torch.xlogy(counts, counts).sum(dim=1)
    return components + weights


def _overlap(responsibility: Tensor, columns: Tensor) -> Tensor:
    """Return the entropy that is lost where pairs of components (p, 2) become one, summed over points, (p,)."""
    lost = []
    for a, b in columns.tolist():
        first, second = responsibility[:, a], responsibility[:, b]
        together = first + second
        lost.append((torch.xlogy(together, together) - torch.xlogy(first, first) - torch.xlogy(second, second)).sum())
    return torch.stack(lost) if lost else responsibility.new_zeros(0)


def _merge_greedily(state: State, pairs: Tensor, overlaps: Tensor) -> bool:
    """Merge pairs, the most rewarding first, each component once, as long as the bound rises."""
    prior = state.posterior.prior
    total = state.sums
    posterior = Posterior.of(total, prior)
    state.posterior, state.bound = posterior, posterior.bound(total)
    if not len(pairs):
        return False
    lost = overlaps.sum(dim=0)
    gain = -lost if prior.kind == "tied" else _gain(total, pairs, posterior) - lost
    used: set[int] = set()
    for index in gain.argsort(descending=True).tolist():
        a, b = sorted(pairs[index].tolist())
        if {a, b} & used or (gain[index] <= -_SLACK and prior.kind != "tied"):
            continue
        merged = _merged(total, a, b, lost[index])
        posterior = Posterior.of(merged, prior)
        if (bound := posterior.bound(merged)) > state.bound:
            used |= {a, b}
            total = merged
            state.blocks = [
                _merged(block, a, b, overlap[index]) for block, overlap in zip(state.blocks, overlaps, strict=True)
            ]
            state.posterior, state.bound = posterior, bound
    return bool(used)


def _merged(sums: Sums, a: int, b: int, overlap: Tensor) -> Sums:
    features = sums.features.clone()
    features[a] += features[b]
    features[b] = 0.0
    categories = [category.clone() for category in sums.categories]
    for category in categories:
        category[:, a] += category[:, b]
        category[:, b] = 0.0
    return replace(sums, features=features, categories=categories, entropy=sums.entropy - overlap)


def _sampled(fit: Fit, posterior: Posterior) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return points (s, d) taken evenly from the data, their categories, and the component of each."""
    stride = max(fit.count // _SAMPLE, 1)
    ask = asker(posterior)
    alive = alive_components(posterior)

    def work(chunk: Chunk) -> tuple[Chunk, Tensor]:
        few = Chunk(x=chunk.x[::stride].clone(), categories=[values[::stride].clone() for values in chunk.categories])
        return few, alive[ask(few).responsibility.argmax(dim=1)]

    found = list(fit.crew.each(work, fit.points.makers()))
    x = torch.cat([chunk.x for chunk, _ in found])
    categories = [torch.cat(values) for values in zip(*(chunk.categories for chunk, _ in found), strict=True)]
    labels = torch.cat([label for _, label in found])
    return fit.crew.gathered(x), [fit.crew.gathered(values) for values in categories], fit.crew.gathered(labels)


def _halved(
    x: Tensor, categories: list[Tensor], labels: Tensor, state: State, generator: torch.Generator
) -> dict[int, tuple[Sums, Sums]]:
    """Return for components that seem to hide two the sums of both halves, the most rewarding ones."""
    prior = state.posterior.prior
    room = int((state.posterior.count < 1e-3).sum())
    found: list[tuple[float, int, tuple[Sums, Sums]]] = []
    for component in torch.unique(labels).tolist():
        rows = (labels == component).nonzero()[:, 0]
        if len(rows) < 4:
            continue
        scale = float(state.posterior.count[component]) / len(rows)
        best: tuple[float, int, tuple[Sums, Sums]] | None = None
        whole = _hard_sums(prior, x[rows], [c[rows] for c in categories], state.sums, scale)
        for side in _cuts(x[rows], state.posterior, component, generator):
            if not 1 < int(side.sum()) < len(rows) - 1:
                continue
            a, b = (
                _hard_sums(prior, x[rows][part], [c[rows][part] for c in categories], state.sums, scale)
                for part in (side, ~side)
            )
            three = _stacked([whole, a, b])
            bounds = Posterior.of(three, replace(prior, process=False)).component_bounds(three)
            counts = three.count
            weights = torch.xlogy(counts[1:], counts[1:]).sum() - torch.xlogy(counts[0], counts[0])
            gain = float(bounds[1] + bounds[2] - bounds[0] + weights)
            if best is None or gain > best[0]:
                best = gain, component, (a, b)
        if best:
            found.append(best)
    none = _empty_bound(state)
    found = sorted((entry for entry in found if entry[0] - none > 0), key=lambda entry: -entry[0])
    return {component: halves for _, component, halves in found[:room]}


def _empty_bound(state: State) -> float:
    sums, prior = state.sums, state.posterior.prior
    none = Sums.none(1, sums.features.shape[1], prior.dim, [len(c) for c in sums.categories], sums.features.device)
    return float(Posterior.of(none, prior).component_bounds(none)[0])


def _cuts(x: Tensor, posterior: Posterior, component: int, generator: torch.Generator) -> list[Tensor]:
    """Return ways to cut points (m, d) of one component in two, (m,) bool each."""
    root = posterior.prior.shape.expand(posterior.root[component : component + 1])[0]
    own = (x - posterior.mean[component]) @ root
    centred = x - x.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    cuts = [_two_means(centred, (centred @ axis) > 0)]
    for _ in range(2):
        first = own[torch.randint(len(own), (1,), generator=generator)]
        distance = ((own - first) ** 2).sum(dim=1)
        second = own[distance.multinomial(1, generator=generator)] if float(distance.sum()) > 0 else first
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


def _hard_sums(prior: Prior, x: Tensor, categories: list[Tensor], like: Sums, scale: float) -> Sums:
    features = prior.shape.features(x).sum(dim=0, keepdim=True) * scale
    counts = [
        torch.bincount(values, minlength=len(c)).to(x.dtype)[:, None] * scale
        for values, c in zip(categories, like.categories, strict=True)
    ]
    return Sums(features=features, categories=counts, scatter=like.scatter, entropy=torch.zeros_like(like.entropy))


def _stacked(sums: list[Sums]) -> Sums:
    return replace(
        sums[0],
        features=torch.cat([part.features for part in sums]),
        categories=[torch.cat(parts, dim=1) for parts in zip(*(part.categories for part in sums), strict=True)],
    )


def _divided(sums: Sums, halves: dict[int, tuple[Sums, Sums]]) -> Sums:
    """Return sums in which the first half takes a component's place and the second that of an empty one."""
    features, categories = sums.features.clone(), [category.clone() for category in sums.categories]
    empty = (sums.count < 1e-3).nonzero()[:, 0].tolist()
    for (component, parts), other in zip(halves.items(), empty, strict=False):
        for place, part in zip((component, other), parts, strict=True):
            features[place] = part.features[0]
            for category, counts in zip(categories, part.categories, strict=True):
                category[:, place] = counts[:, 0]
    return replace(sums, features=features, categories=categories)


def _total(parts: list[Sums]) -> Sums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
