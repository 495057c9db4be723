"""Split and merge moves, each kept when it raises the bound.

Merges follow Hughes and Sudderth (Memoized online variational inference, NIPS 2013, 4.2), and splits follow Ueda et al.
(SMEM algorithm for mixture models, Neural Computation 2000).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from services.distiller.mixture.data import Chunk
from services.distiller.mixture.e_step import alive_components, make_evaluator
from services.distiller.mixture.fit_state import Fit, FitState
from services.distiller.mixture.posterior import FILLED, SLACK, Posterior, Sums, empty_bound
from services.distiller.mixture.subclusters import DividedComponent, divided_components

# Components that each component is compared with: those whose means it finds likeliest.
_NEIGHBOURS = 6


def merge(fit: Fit, state: FitState) -> bool:
    """Merge pairs of components when that raises the bound.

    It passes over the data once, and returns whether it merged any.
    """
    pairs = _candidates(state)
    overlaps = torch.zeros(len(fit.blocks), len(pairs), dtype=torch.float64, device=pairs.device)
    ask = make_evaluator(state.posterior)
    alive = alive_components(state.posterior)
    column = torch.full((fit.prior.components,), -1, device=alive.device)
    column[alive] = torch.arange(len(alive), device=alive.device)

    def work(chunk: Chunk) -> tuple[Sums, Tensor]:
        answer = ask(chunk)
        return answer.sums, _overlap(answer.responsibility, column[pairs])

    for number, rows in enumerate(fit.blocks):
        total = fit.no_sums()
        for sums, lost in fit.reducer.each(work, fit.points.makers(rows)):
            # Added one by one, as there may be many chunks.
            total = total + sums
            overlaps[number] += lost
        *parts, overlaps[number] = fit.reducer.total([*total.parts(), overlaps[number]])
        state.blocks[number] = total.of(parts)
    merged = _merge_greedily(state, pairs, overlaps)
    fit.note(state)
    return merged


def _candidates(state: FitState) -> Tensor:
    """Return pairs (p, 2) of components that may be merged.

    Of each pair, at least one component gives the mean of the other a high density.
    """
    posterior, sums = state.posterior, state.sums
    alive = (posterior.count > FILLED).nonzero()[:, 0]
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
    return pairs[gain > -SLACK]


def _gain(sums: Sums, pairs: Tensor, posterior: Posterior) -> Tensor:
    """Return the approximate change (p,) of the bound by merging pairs (p, 2).

    The estimate assumes that the components of a pair share no point.
    """
    both = sums.take(pairs[:, 0])
    other = sums.take(pairs[:, 1])
    merged = replace(
        both,
        features=both.features + other.features,
        categories=[a + b for a, b in zip(both.categories, other.categories, strict=True)],
    )
    own = posterior.component_bounds(sums)
    components = Posterior.of(merged, posterior.prior).component_bounds(merged) - own[pairs].sum(dim=1)
    counts = sums.count[pairs]  # (p, 2)
    weights = torch.xlogy(merged.count, merged.count) - torch.xlogy(counts, counts).sum(dim=1)
    return components + empty_bound(sums, posterior.prior) + weights


def _overlap(responsibility: Tensor, columns: Tensor) -> Tensor:
    """Return the entropy (p,) that merging each pair of components (p, 2) loses.

    It is summed over points.
    """
    lost = []
    for a, b in columns.tolist():
        first, second = responsibility[:, a], responsibility[:, b]
        together = first + second
        lost.append((torch.xlogy(together, together) - torch.xlogy(first, first) - torch.xlogy(second, second)).sum())
    return torch.stack(lost) if lost else responsibility.new_zeros(0)


def _merge_greedily(state: FitState, pairs: Tensor, overlaps: Tensor) -> bool:
    """Merge pairs while the bound rises, and return whether any was merged.

    The pair with the largest estimated rise comes first, and each component is merged at most once.
    """
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
        if {a, b} & used or (gain[index] <= -SLACK and prior.kind != "tied"):
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


# Iterations after which a split is judged.
TRIAL = 4
# Iterations without a split can gain this much.
_LEAST_RISE = 1.0
# When all splits together fail, the most promising shares of them are tried alone.
_SHARES = (1.0, 0.5, 0.2)


def split(fit: Fit, state: FitState, generator: torch.Generator) -> bool:
    """Split components, at most as many as there are empty ones.

    Returns whether any split is kept.
    """
    spare = int((state.posterior.count < FILLED).sum())
    found = divided_components(fit, state, generator)[:spare] if spare else []
    return any(_try_splits(fit, state, found[: math.ceil(share * len(found))]) for share in _SHARES if found)


def _try_splits(fit: Fit, state: FitState, divided: list[DividedComponent]) -> bool:
    """Try some splits, and return whether they are kept.

    They are kept when the bound is higher a few iterations later.
    """
    posterior = Posterior.of(_divided(state.sums, divided), fit.prior)
    # Every block is evaluated first: a block that still has the whole component would restore it.
    trial = replace(state, blocks=[fit.expect(posterior, rows) for rows in fit.blocks], bounds=list(state.bounds))
    fit.update(trial)
    fit.note(trial)
    for _ in range(TRIAL - 1):
        fit.step(trial)
    while merge(fit, trial):
        pass
    rise = trial.bound - state.bound
    if rise > 0:
        vars(state).update(vars(trial))
    return rise > _LEAST_RISE


def _divided(sums: Sums, found: list[DividedComponent]) -> Sums:
    """Return sums in which sub-clusters replace their components.

    One sub-cluster replaces its component, and the other an empty component.
    """
    features, categories = sums.features.clone(), [category.clone() for category in sums.categories]
    empty = (sums.count < FILLED).nonzero()[:, 0].tolist()
    for divided, other in zip(found, empty, strict=False):
        places = [divided.component, other]
        features[places] = divided.sums.features
        for category, counts in zip(categories, divided.sums.categories, strict=True):
            category[:, places] = counts
    return replace(sums, features=features, categories=categories)
