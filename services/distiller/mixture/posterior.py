"""The variational posterior of a Dirichlet-process mixture, and its bound.

Both are functions of sums over the data (Blei and Jordan, Variational inference for Dirichlet process mixtures,
Bayesian Analysis 2006). Components are Gaussian-Wishart (Bishop, Pattern Recognition and Machine Learning, 2006, 10.2).
Constants are dropped from the bound as in scikit-learn, so that both bounds can be compared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from services.distiller.mixture.covariances import LOG_2_PI, SHAPES, CovarianceType, Shape

# A component with fewer points may be replaced.
FILLED = 1e-3
# Error of the quick estimates of a merge or a split; the bound itself decides.
SLACK = 10.0
# Added to every count, as in scikit-learn, so that an empty component has a mean.
LEAST_COUNT = 10 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The prior, in the coordinates of the fit."""

    kind: CovarianceType
    components: int
    # A Dirichlet process by stick-breaking, truncated at `components`; otherwise a finite Dirichlet distribution.
    process: bool
    concentration: float
    mean_precision: float
    mean: Tensor  # (d,)
    degrees_of_freedom: float
    covariance: Tensor  # (d, d), (d,) or ()
    # Added to the covariance of the points of a component, in the shape of the prior's.
    ridge: Tensor
    # Log determinant of the coordinates: the difference between log densities in both units.
    log_determinant: float
    # Concentration of the Dirichlet prior of each categorical factor.
    category_concentration: float = 1.0

    @property
    def shape(self) -> Shape:
        return SHAPES[self.kind](self.dim)

    @property
    def dim(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Responsibility-weighted sums over points.

    They are the sufficient statistics of a posterior, and additive.
    """

    features: Tensor  # (K, f)
    # For each categorical factor of c values (c, K).
    categories: Sequence[Tensor]
    scatter: Tensor  # (d, d) of all points
    # Minus the sum of r log r over points and components.
    entropy: Tensor  # ()

    @classmethod
    def none(cls, components: int, width: int, dim: int, sizes: Sequence[int], device: torch.device) -> "Sums":
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(
            features=zeros(components, width),
            categories=[zeros(size, components) for size in sizes],
            scatter=zeros(dim, dim),
            entropy=zeros(),
        )

    @property
    def count(self) -> Tensor:
        """Return the number of points of each component, (K,)."""
        return self.features[:, 0]

    def parts(self) -> list[Tensor]:
        return [self.features, self.scatter, self.entropy, *self.categories]

    def of(self, parts: Sequence[Tensor]) -> "Sums":
        """Return sums with other values and the same structure."""
        return Sums(features=parts[0], scatter=parts[1], entropy=parts[2], categories=list(parts[3:]))

    def __add__(self, other: "Sums") -> "Sums":
        return self.of([mine + its for mine, its in zip(self.parts(), other.parts(), strict=True)])

    @classmethod
    def total(cls, parts: Iterable["Sums"]) -> "Sums":
        return reduce(cls.__add__, parts)

    def take(self, components: Tensor) -> "Sums":
        """Return the sums of some components, in the given order."""
        return replace(
            self,
            features=self.features[components],
            categories=[category[:, components] for category in self.categories],
        )


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The posterior of K components.

    All arrays are (K, ...) except a tied covariance.
    """

    prior: Prior
    count: Tensor  # (K,)
    mean_precision: Tensor  # (K,)
    mean: Tensor  # (K, d)
    degrees_of_freedom: Tensor  # (K,) or ()
    covariance: Tensor
    root: Tensor  # of the precision
    # Parameters of the sticks' Beta distributions, (K,) both; the second is () for a finite Dirichlet distribution.
    concentration: tuple[Tensor, Tensor]
    # For each categorical factor (c, K): expected log probabilities.
    log_categories: Sequence[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, sums: Sums, prior: Prior) -> "Posterior":
        """Return the posterior that maximises the bound for given responsibilities."""
        shape, count = prior.shape, sums.count + LEAST_COUNT
        moments = shape.moments(sums.features, sums.scatter, count)
        mean_precision = prior.mean_precision + count
        mean = (prior.mean_precision * prior.mean + count[:, None] * moments.mean) / mean_precision[:, None]
        pull = shape.outer(moments.mean - prior.mean, prior.mean_precision * count / mean_precision)
        degrees, scatter = prior.degrees_of_freedom + count, moments.covariance + prior.ridge
        if prior.kind == "tied":
            degrees = prior.degrees_of_freedom + count.sum() / prior.components
            covariance = prior.covariance + (scatter * count.sum() + pull) / prior.components
        else:
            covariance = prior.covariance + _broadcast(count, scatter) * scatter + pull
        covariance = covariance / _broadcast(degrees, covariance)
        return cls(
            prior=prior,
            count=count,
            mean_precision=mean_precision,
            mean=mean,
            degrees_of_freedom=degrees,
            covariance=covariance,
            root=shape.precision_root(covariance),
            concentration=_concentration(count, prior),
            log_categories=[_log_category(category, prior) for category in sums.categories],
        )

    def expected_log_weights(self) -> Tensor:
        """Return E[log pi], (K,)."""
        first, second = self.concentration
        if not self.prior.process:
            return torch.digamma(first) - torch.digamma(first.sum())
        both = torch.digamma(first + second)
        left = torch.cumsum(torch.digamma(second) - both, dim=0)
        return torch.digamma(first) - both + torch.cat([torch.zeros_like(left[:1]), left[:-1]])

    def weights(self) -> Tensor:
        """Return the expected weights (K,), defined as in scikit-learn.

        They sum to 1.
        """
        first, second = self.concentration
        if not self.prior.process:
            return first / first.sum()
        left = torch.cumprod(second / (first + second), dim=0)
        weights = first / (first + second) * torch.cat([torch.ones_like(left[:1]), left[:-1]])
        return weights / weights.sum()

    def constant(self) -> Tensor:
        """Return the constant part (K,) of a point's expected log density.

        It depends on the component but not on the point.
        """
        dim, degrees = self.prior.dim, self.degrees_of_freedom
        divided = 0.5 * (degrees[..., None] - torch.arange(dim, dtype=degrees.dtype, device=degrees.device))
        log_lambda = dim * math.log(2.0) + torch.digamma(divided).sum(dim=-1)
        density = self.prior.shape.log_determinant(self.root) + self.prior.log_determinant
        normal = density - 0.5 * dim * (LOG_2_PI + degrees.log())
        return normal + 0.5 * (log_lambda - dim / self.mean_precision) + self.expected_log_weights()

    def coefficients(self) -> Tensor:
        """Return the coefficients (f, K) of features in E[log pi + log p(x)].

        Categories are left out.
        """
        coefficients = self.prior.shape.coefficients(self.mean, self.root)
        coefficients[0] += self.constant()
        return coefficients

    def component_bounds(self, sums: Sums) -> Tensor:
        """Return each component's contribution (K,) to the bound, without its weight.

        It has no meaning for a tied covariance.
        """
        categories = sum((_log_dirichlet(category, self.prior) for category in sums.categories), torch.zeros(()))
        return categories - log_wishart_norm(self) - 0.5 * self.prior.dim * self.mean_precision.log()

    def bound(self, sums: Sums) -> float:
        """Return the lower bound of the log evidence, up to a constant.

        `sums` are those that the posterior was made from.
        """
        first, second = self.concentration
        if self.prior.process:
            weights = _log_beta(first, second).sum()
        else:
            weights = torch.lgamma(first).sum() - torch.lgamma(first.sum())
        # A tied normaliser counts once for each component, as in scikit-learn.
        return float(sums.entropy + weights + self.component_bounds(sums).sum())


def empty_bound(like: Sums, prior: Prior) -> float:
    """Return the contribution of an empty component to the bound."""
    none = Sums.none(1, like.features.shape[1], prior.dim, [len(c) for c in like.categories], like.features.device)
    return float(Posterior.of(none, prior).component_bounds(none)[0])


def log_wishart_norm(posterior: Posterior) -> Tensor:
    """Return the log normalisers of the components' Wishart distributions.

    They are (K,), or () for a tied covariance, and without the factors of pi.
    """
    dim, degrees = posterior.prior.dim, posterior.degrees_of_freedom
    log_det = posterior.prior.shape.log_determinant(posterior.root) + posterior.prior.log_determinant
    log_det = log_det - 0.5 * dim * degrees.log()
    divided = 0.5 * (degrees[..., None] - torch.arange(dim, dtype=degrees.dtype, device=degrees.device))
    return -(degrees * log_det + degrees * dim * 0.5 * math.log(2.0) + torch.lgamma(divided).sum(dim=-1))


def _concentration(count: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    if not prior.process:
        return prior.concentration + count, torch.zeros((), dtype=count.dtype, device=count.device)
    later = count.flip(0).cumsum(0).flip(0) - count  # points of all components last
    later[-1] = 0.0
    return 1.0 + count, prior.concentration + later


def _log_category(count: Tensor, prior: Prior) -> Tensor:
    """Return E[log probability] (c, K) of one factor's values, given their counts."""
    first = prior.category_concentration + count
    return torch.digamma(first) - torch.digamma(first.sum(dim=0))


def _log_dirichlet(count: Tensor, prior: Prior) -> Tensor:
    """Return each component's share (K,) of one factor's bound.

    `count` is (c, K). The share is 0 for a component without points.
    """
    size, gamma = len(count), prior.category_concentration
    raised = (torch.lgamma(gamma + count) - math.lgamma(gamma)).sum(dim=0)
    return raised - torch.lgamma(size * gamma + count.sum(dim=0)) + math.lgamma(size * gamma)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return values (K,) or () shaped for multiplication with `like` (K, ...)."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
