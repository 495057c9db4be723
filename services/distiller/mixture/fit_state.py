"""Coordinate ascent on the bound: expectation over the data, posterior from the sums, again and again.

With several blocks it is memoized (Hughes and Sudderth, Memoized online variational inference, NIPS 2013): the sums of
each block are kept, and the posterior is made anew after every block, so that one pass over the data moves as far as
several. The bound rises at every step all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from services.distiller.mixture.data import Points
from services.distiller.mixture.e_step import asker
from services.distiller.mixture.parallel import Reducer
from services.distiller.mixture.posterior import Posterior, Prior, Sums


@dataclass(kw_only=True)
class FitState:
    """Where a fit stands."""

    posterior: Posterior
    # Of each block: what its points say under the posterior that it was last asked about.
    blocks: list[Sums]
    bound: float
    iteration: int = 0
    converged: bool = False
    bounds: list[float] = field(default_factory=list)

    @property
    def sums(self) -> Sums:
        return Sums.total(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is fitted, and with which hands."""

    points: Points
    prior: Prior
    reducer: Reducer
    blocks: list[slice]
    # Points of all processes.
    count: int
    # Told the bound after every pass over the data; may raise to stop.
    check: Callable[[float], None]

    def begin(self, blocks: list[Sums]) -> FitState:
        """Return the state after responsibilities given by their sums, block by block."""
        total = Sums.total(blocks)
        posterior = Posterior.of(total, self.prior)
        return FitState(posterior=posterior, blocks=blocks, bound=posterior.bound(total))

    def expect(self, posterior: Posterior, rows: slice | None = None) -> Sums:
        """Return the sums of some rows of every process, or of all, under a posterior."""
        ask = asker(posterior)
        return self.sum_up(lambda chunk: ask(chunk).sums, rows)

    def sum_up(self, work: Callable[..., Sums], rows: slice | None = None) -> Sums:
        """Return the total of what `work` makes of every chunk of some rows, over all processes."""
        total = Sums.total(self.reducer.each(work, self.points.makers(rows)))
        return total.of(self.reducer.total(total.parts()))

    def step(self, state: FitState) -> None:
        """Go once over the data."""
        for number, rows in enumerate(self.blocks):
            state.blocks[number] = self.expect(state.posterior, rows)
            state.posterior = Posterior.of(state.sums, self.prior)
        state.bound = state.posterior.bound(state.sums)
        self.note(state)

    def update(self, state: FitState) -> None:
        """Make posterior and bound of what the blocks say."""
        state.posterior = Posterior.of(state.sums, self.prior)
        state.bound = state.posterior.bound(state.sums)

    def note(self, state: FitState) -> None:
        """Count a pass over the data, and tell its bound."""
        state.iteration += 1
        state.bounds.append(state.bound)
        self.check(state.bound)

    def no_sums(self) -> Sums:
        prior, points = self.prior, self.points
        return Sums.none(prior.components, prior.shape.width(), prior.dim, points.sizes, points.device)
