"""The state of a fit, and a step through the data.

A step is an E-step over the data, then the posterior from the sums. With several blocks
it is memoized: the sums of each block are kept, and the posterior is updated after
every block, so that one pass over the data advances as far as several (Hughes and
Sudderth, Memoized online variational inference, NIPS 2013). The bound still rises at
every step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from services.distiller.mixture.data import Points
from services.distiller.mixture.e_step import make_evaluator
from services.distiller.mixture.parallel import Reducer
from services.distiller.mixture.posterior import Posterior, Prior, Sums


@dataclass(kw_only=True)
class FitState:
    """The posterior, sums and bounds that a fit has reached."""

    posterior: Posterior
    # The sums of each block under the posterior that last evaluated it.
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
    """The data, the prior and the workers of a fit.

    The workers are threads and processes.
    """

    points: Points
    prior: Prior
    reducer: Reducer
    blocks: list[slice]
    # Points of all processes.
    count: int
    # Called with the bound after every pass over the data; may raise to stop.
    check: Callable[[float], None]

    def begin(self, blocks: list[Sums]) -> FitState:
        """Return the state that follows from initial responsibilities.

        The responsibilities are given by the sums of each block.
        """
        total = Sums.total(blocks)
        posterior = Posterior.of(total, self.prior)
        return FitState(posterior=posterior, blocks=blocks, bound=posterior.bound(total))

    def expect(self, posterior: Posterior, rows: slice | None = None) -> Sums:
        """Return the sums of rows of every process under a posterior.

        Without `rows`, the sums are over all rows.
        """
        ask = make_evaluator(posterior)
        return self.sum_up(lambda chunk: ask(chunk).sums, rows)

    def sum_up(self, work: Callable[..., Sums], rows: slice | None = None) -> Sums:
        """Return the total of `work` over chunks and processes."""
        total = Sums.total(self.reducer.each(work, self.points.makers(rows)))
        return total.of(self.reducer.total(total.parts()))

    def step(self, state: FitState) -> None:
        """Update the state by one pass over the data."""
        for number, rows in enumerate(self.blocks):
            state.blocks[number] = self.expect(state.posterior, rows)
            state.posterior = Posterior.of(state.sums, self.prior)
        state.bound = state.posterior.bound(state.sums)
        self.note(state)

    def update(self, state: FitState) -> None:
        """Update posterior and bound from the sums of the blocks."""
        state.posterior = Posterior.of(state.sums, self.prior)
        state.bound = state.posterior.bound(state.sums)

    def note(self, state: FitState) -> None:
        """Count a pass over the data and report its bound."""
        state.iteration += 1
        state.bounds.append(state.bound)
        self.check(state.bound)

    def no_sums(self) -> Sums:
        prior, points = self.prior, self.points
        return Sums.none(prior.components, prior.shape.width(), prior.dim, points.sizes, points.device)
