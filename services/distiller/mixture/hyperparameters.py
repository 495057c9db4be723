"""What is believed of a component before its points are seen, learned from all components: empirical Bayes.

The prior of scikit-learn's mixture expects a component to be as wide as all data together, and as strange as may be. A
small component then costs much more evidence than it should, and is given to its neighbour. The components that are
found say better what a component looks like: the prior is set to the maximum of the bound, given them (type II maximum
likelihood, as in Bishop, Pattern Recognition and Machine Learning, 3.5 and 10.2).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from services.distiller.mixture.posterior import Posterior, Prior

# Components of fewer points than these times the dimensions look like the prior whatever it is: they would keep it.
_LEAST_POINTS = 2.0
# Degrees of freedom that are tried, beyond the fewest that a prior can have: so many, up to these times the dimensions.
_TRIED, _MOST = 64, 4.0


def learned(posterior: Posterior) -> Prior:
    """Return the prior that makes the bound highest for a posterior; its own where there is nothing to learn from."""
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
    """Return nu with the highest expected log Wishart density of the components' precisions, its scale as it fits them.

    Of Wishart(nu, W) with nu W = P, the mean of all expected precisions.
    """
    dim, degrees = posterior.prior.dim, posterior.degrees_of_freedom[filled]
    tried = dim - 1 + torch.logspace(0, math.log10(_MOST * dim + 1), _TRIED, dtype=torch.float64, device=degrees.device)
    log_determinant = 2 * posterior.prior.shape.log_determinant(posterior.root[filled]) - dim * degrees.log()
    expected = (log_determinant + dim * math.log(2.0) + _summed_digamma(degrees, dim)).mean()
    density = 0.5 * tried * (expected - typical_log_determinant - dim + dim * (tried / 2).log())
    halves = 0.5 * (tried[:, None] - torch.arange(dim, dtype=tried.dtype, device=tried.device))
    return float(tried[(density - torch.lgamma(halves).sum(dim=1)).argmax()])


def _summed_digamma(degrees: Tensor, dim: int) -> Tensor:
    halves = 0.5 * (degrees[:, None] - torch.arange(dim, dtype=degrees.dtype, device=degrees.device))
    return torch.digamma(halves).sum(dim=1)


def _kept(typical: Tensor, prior: Prior) -> Tensor:
    """Return the inverse of the typical precision (d, d), as the covariance type keeps it."""
    if prior.kind == "full":
        inverse: Tensor = torch.linalg.inv(typical)
        return (inverse + inverse.mT) / 2
    variances = 1.0 / typical.diagonal()
    return variances if prior.kind == "diag" else variances[0]
