"""Moves that coordinate ascent cannot make: it ends with several components in one cluster, or one in several."""

import torch

from services.distiller.mixture.fitting import Fit, State
from services.distiller.mixture.merges import merge
from services.distiller.mixture.posterior import Posterior, Sums
from services.distiller.mixture.splits import TRIAL, split

_MOST_ROUNDS = 10


def improve(fit: Fit, state: State, generator: torch.Generator) -> None:
    """Merge and split until neither raises the bound."""
    for _ in range(_MOST_ROUNDS):
        while merge(fit, state):
            pass
        order(state)
        for _ in range(TRIAL):
            fit.step(state)
        if not split(fit, state, generator):
            return


def order(state: State) -> None:
    """Put the largest components first, where sticks expect them, if the bound is the higher for it."""
    ranks = state.posterior.count.argsort(descending=True, stable=True)
    blocks = [block.take(ranks) for block in state.blocks]
    total = Sums.total(blocks)
    posterior = Posterior.of(total, state.posterior.prior)
    if (bound := posterior.bound(total)) > state.bound:
        state.blocks, state.posterior, state.bound = blocks, posterior, bound
