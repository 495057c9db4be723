"""The EM loop: iterations, split and merge moves, and a learned prior.

The prior of scikit-learn's mixture expects a component to be as wide as all data, with
vague degrees of freedom. A small component then costs much more evidence than it
should, and is merged with its neighbour. The components that were found are better
evidence of the shape of a component: the prior is set to the maximum of the bound,
given these components (type II maximum likelihood, as in Bishop, Pattern Recognition
and Machine Learning, 3.5 and 10.2).
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from services.distiller.mixture.fit_state import Fit, FitState
from services.distiller.mixture.posterior import Posterior, Prior, Sums
from services.distiller.mixture.split_merge import TRIAL, merge, split

# Components with fewer points than this times the dimensions resemble any prior, and would only confirm it.
_LEAST_POINTS = 2.0
# Number of degrees of freedom that are tried, from the least possible up to this multiple of the dimensions.
_TRIED, _MOST = 64, 4.0


def learn_prior(posterior: Posterior) -> Prior:
    """Return the prior that maximises the bound for a posterior.

    Returns the posterior's own prior when fewer than two components have enough points, or the covariance is tied.
    """
    prior = posterior.prior
    filled = posterior.count > _LEAST_POINTS * prior.dim
    if prior.kind == "tied" or int(filled.sum()) < 2:
        return prior
    shape, root = prior.shape, posterior.root[filled]
    precision = shape.expand(root) @ shape.expand(root).mT  # (a, d, d)
    typical = precision.mean(dim=0)
    degrees = _degrees_of_freedom(posterior, filled, float(torch.linalg.slogdet(typical)[1]))
    apart = posterior.mean[filled] - prior.mean
    spread = torch.einsum("kd,kde,ke->k", apart, precision, apart) + prior.dim / posterior.mean_precision[filled]
    return replace(
        prior,
        degrees_of_freedom=degrees,
        covariance=degrees * _kept(typical, prior),
        mean_precision=prior.dim / float(spread.mean()),
    )


def _degrees_of_freedom(posterior: Posterior, filled: Tensor, typical_log_determinant: float) -> float:
    """Return the degrees of freedom nu with the highest expected log density.

    The density is the Wishart density of the components' precisions, with a fitted
    scale: Wishart(nu, W), where nu W = P is the mean of all expected precisions.
    """
    dim, degrees = posterior.prior.dim, posterior.degrees_of_freedom[filled]
    tried = dim - 1 + torch.logspace(0, math.log10(_MOST * dim + 1), _TRIED, dtype=torch.float64, device=degrees.device)
    log_determinant = 2 * posterior.prior.shape.log_determinant(posterior.root[filled]) - dim * degrees.log()
    expected = (log_determinant + dim * math.log(2.0) + _summed_digamma(degrees, dim)).mean()
    density = 0.5 * tried * (expected - typical_log_determinant - dim + dim * (tried / 2).log())
    divided = 0.5 * (tried[:, None] - torch.arange(dim, dtype=tried.dtype, device=tried.device))
    return float(tried[(density - torch.lgamma(divided).sum(dim=1)).argmax()])


def _summed_digamma(degrees: Tensor, dim: int) -> Tensor:
    divided = 0.5 * (degrees[:, None] - torch.arange(dim, dtype=degrees.dtype, device=degrees.device))
    return torch.digamma(divided).sum(dim=1)


def _kept(typical: Tensor, prior: Prior) -> Tensor:
    """Return the inverse of the typical precision (d, d), by covariance type."""
    if prior.kind == "full":
        inverse: Tensor = torch.linalg.inv(typical)
        return (inverse + inverse.mT) / 2
    variances = 1.0 / typical.diagonal()
    return variances if prior.kind == "diag" else variances[0]


_MOST_ROUNDS = 10


def split_and_merge(fit: Fit, state: FitState, generator: torch.Generator) -> None:
    """Merge and split components until neither raises the bound."""
    for _ in range(_MOST_ROUNDS):
        while merge(fit, state):
            pass
        sort_components(state)
        for _ in range(TRIAL):
            fit.step(state)
        if not split(fit, state, generator):
            return


def sort_components(state: FitState) -> None:
    """Sort components by size when that raises the bound.

    Stick-breaking expects the largest component first.
    """
    ranks = state.posterior.count.argsort(descending=True, stable=True)
    blocks = [block.take(ranks) for block in state.blocks]
    total = Sums.total(blocks)
    posterior = Posterior.of(total, state.posterior.prior)
    if (bound := posterior.bound(total)) > state.bound:
        state.blocks, state.posterior, state.bound = blocks, posterior, bound


# Iterations before the first move, so that components have found their places.
_WARM_UP = 4


@dataclass(frozen=True, kw_only=True)
class EMLoop:
    """The EM loop, with its tolerance and its limit of iterations.

    `moves` is whether it splits and merges components.
    """

    moves: bool
    tol: float
    max_iter: int

    def run(self, fit: Fit, state: FitState, generator: torch.Generator) -> None:
        """Iterate until the bound rises by less than `tol`.

        Warns when `max_iter` passes do not suffice.
        """
        if self.moves:
            for _ in range(min(_WARM_UP, self.max_iter)):
                fit.step(state)
            split_and_merge(fit, state, generator)
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

    def learn(self, fit: Fit, state: FitState, generator: torch.Generator) -> Fit:
        """Continue with a prior learned from the components.

        Later bounds belong to another model and cannot be compared with earlier ones.
        """
        fit = replace(fit, prior=learn_prior(state.posterior))
        state.converged = False
        fit.update(state)
        self.run(fit, state, generator)
        return fit
