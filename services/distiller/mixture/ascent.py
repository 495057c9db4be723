"""A fit from its start to a bound that moves no more: moves, then iterations; then perhaps a better prior."""

import warnings
from dataclasses import dataclass, replace

import torch
from sklearn.exceptions import ConvergenceWarning

from services.distiller.mixture import hyperparameters, moves
from services.distiller.mixture.fitting import Fit, State

# Iterations before the first move: components must have found their places.
_WARM_UP = 4


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """How far a fit goes, and whether by moves, too."""

    moves: bool
    tol: float
    max_iter: int

    def climb(self, fit: Fit, state: State, generator: torch.Generator) -> None:
        """Raise the bound until it moves by less than `tol`; warn where `max_iter` passes do not get there."""
        if self.moves:
            for _ in range(min(_WARM_UP, self.max_iter)):
                fit.step(state)
            moves.improve(fit, state, generator)
        before = state.bound
        while state.iteration < self.max_iter and not state.converged:
            fit.step(state)
            state.converged = abs(state.bound - before) < self.tol
            before = state.bound
        if not state.converged:
            warnings.warn(
                f"the bound still moved by more than tol={self.tol:g} in iteration {state.iteration}; raise max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )

    def learn(self, fit: Fit, state: State, generator: torch.Generator) -> Fit:
        """Go on with a prior that is learned from what was found; bounds from here on are of another model."""
        fit = replace(fit, prior=hyperparameters.learned(state.posterior))
        state.converged = False
        fit.update(state)
        self.climb(fit, state, generator)
        return fit
