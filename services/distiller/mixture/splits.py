"""A component that may hide two is divided, and stays so if the bound is higher some iterations later.

Ueda et al., SMEM algorithm for mixture models (Neural Computation 2000).
"""

import math
from dataclasses import replace

import torch

from services.distiller.mixture.fitting import Fit, State
from services.distiller.mixture.merges import merge
from services.distiller.mixture.posterior import FILLED, Posterior, Sums
from services.distiller.mixture.subclusters import Halves, halved

# Iterations that a split is given to prove itself.
TRIAL = 4
# Less is what iterations bring without a split.
_LEAST_RISE = 1.0
# Where all splits together fail, the most promising ones are tried alone.
_SHARES = (1.0, 0.5, 0.2)


def split(fit: Fit, state: State, generator: torch.Generator) -> bool:
    """Divide components that may hide two, as many as there are empty ones; say whether any stay divided."""
    room = int((state.posterior.count < FILLED).sum())
    found = halved(fit, state, generator)[:room] if room else []
    return any(_stays(fit, state, found[: math.ceil(share * len(found))]) for share in _SHARES if found)


def _stays(fit: Fit, state: State, halves: list[Halves]) -> bool:
    """Try some splits; keep them if the bound is higher a few iterations later, and say whether it is so by much."""
    posterior = Posterior.of(_divided(state.sums, halves), fit.prior)
    # Every block is asked first: one that still knows the whole component would win it back.
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


def _divided(sums: Sums, found: list[Halves]) -> Sums:
    """Return sums in which the first half takes a component's place and the second that of an empty one."""
    features, categories = sums.features.clone(), [category.clone() for category in sums.categories]
    empty = (sums.count < FILLED).nonzero()[:, 0].tolist()
    for halves, other in zip(found, empty, strict=False):
        places = [halves.component, other]
        features[places] = halves.sums.features
        for category, counts in zip(categories, halves.sums.categories, strict=True):
            category[:, places] = counts
    return replace(sums, features=features, categories=categories)
