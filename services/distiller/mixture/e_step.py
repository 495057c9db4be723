"""The E-step: responsibilities of all components, or of near ones only.

`ask_all` evaluates every component for every point, in two matrix products. In many
dimensions, most components are so far from a point that their responsibility vanishes
in floating point. `Screening` finds these components from a few dimensions. The
distance in the leading dimensions never exceeds the whole one: for an upper triangular
precision root U, (x - m)^T U U^T (x - m) is a sum of squares of which the first q need
only the first q dimensions of x (the distance under the marginal). A few dimensions
therefore bound every log joint from above, one component evaluated in full bounds the
best one from below, and negligible components are left out. Coordinates are rotated so
that the leading dimensions are those in which the components differ most.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.distiller.mixture.covariances import Full
from services.distiller.mixture.data import Chunk
from services.distiller.mixture.posterior import Posterior, Sums

# A component with fewer points than this is no longer evaluated.
NOTHING = 1e-10


@dataclass(frozen=True, kw_only=True)
class AliveComponents:
    """The components of a posterior that one pass over the data evaluates."""

    posterior: Posterior
    alive: Tensor  # (a,) components
    coefficients: Tensor  # (f, a)
    log_categories: Sequence[Tensor]  # (c, a) each

    @classmethod
    def of(cls, posterior: Posterior) -> "AliveComponents":
        alive = alive_components(posterior)
        coefficients = posterior.coefficients()[:, alive]
        return cls(
            posterior=posterior,
            alive=alive,
            coefficients=coefficients.contiguous(),
            log_categories=[table[:, alive].contiguous() for table in posterior.log_categories],
        )

    def log_joint(self, features: Tensor, categories: Sequence[Tensor]) -> Tensor:
        """Return E[log pi + log p(point)] of points and alive components, (b, a).

        Terms that all components have in common are left out.
        """
        joint = features @ self.coefficients
        for table, values in zip(self.log_categories, categories, strict=True):
            joint += table[values]
        return joint


def alive_components(posterior: Posterior) -> Tensor:
    """Return the components that have points, and the likeliest empty one.

    Empty components are alike: when the likeliest of them gets no points, none would.
    """
    is_alive = posterior.count > NOTHING
    if not bool(is_alive.all()):
        weight = posterior.expected_log_weights().masked_fill(is_alive, -torch.inf)
        is_alive = is_alive.clone()
        is_alive[weight.argmax()] = True
    return is_alive.nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True)
class ChunkResponsibilities:
    """The responsibilities and sums of one chunk."""

    responsibility: Tensor  # (b, a)
    normaliser: Tensor  # (b,) log sums of the joints that the responsibilities were made of
    sums: Sums


def ask_all(chunk: Chunk, lookup: AliveComponents) -> ChunkResponsibilities:
    """Evaluate every alive component for every point of a chunk."""
    features = lookup.posterior.prior.shape.features(chunk.x)
    joint = lookup.log_joint(features, chunk.categories)
    normaliser = normalise_(joint)
    sums = _summed(chunk, features, joint, normaliser, lookup)
    return ChunkResponsibilities(responsibility=joint, normaliser=normaliser, sums=sums)


def normalise_(joint: Tensor) -> Tensor:
    """Replace log joints (b, a) by responsibilities; return their log sums (b,)."""
    highest = joint.amax(dim=1, keepdim=True)
    joint.sub_(highest).exp_()
    total = joint.sum(dim=1, keepdim=True)
    joint.div_(total)
    return (highest + total.log())[:, 0]


def _summed(
    chunk: Chunk, features: Tensor, responsibility: Tensor, normaliser: Tensor, lookup: AliveComponents
) -> Sums:
    """Return the sums of a chunk, given its responsibilities (b, a).

    `normaliser` (b,) has the log sums of the joints. -sum r log r equals these log sums minus responsibilities times
    log joints, which are linear in the sums.
    """
    prior = lookup.posterior.prior
    found = responsibility.T @ features  # (a, f)
    counts = [
        torch.zeros(len(table), len(lookup.alive), dtype=found.dtype, device=found.device).index_add_(
            0, values, responsibility
        )
        for table, values in zip(lookup.log_categories, chunk.categories, strict=True)
    ]
    expected = (found * lookup.coefficients.T).sum()
    for count, table in zip(counts, lookup.log_categories, strict=True):
        expected += (count * table).sum()
    sums = Sums.none(prior.components, features.shape[1], prior.dim, [len(count) for count in counts], found.device)
    sums.features[lookup.alive] = found
    for whole, part in zip(sums.categories, counts, strict=True):
        whole[:, lookup.alive] = part
    scatter = chunk.x.T @ chunk.x if prior.kind == "tied" else sums.scatter
    return sums.of([sums.features, scatter, normaliser.sum() - expected, *sums.categories])


# From this dimension on, screening pays for itself.
LEAST_DIM = 32
_LEADING = 16
# Log joints this far below a point's best one are negligible: e**-30 is 1e-13.
_FAR = 30.0
# A pair evaluated in full costs about twice its share of the product over all pairs.
_MOST_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Screening:
    """A posterior that is evaluated in leading dimensions first.

    It applies to full covariance matrices only.
    """

    lookup: AliveComponents
    leading: Tensor  # (f', a) coefficients of the features of the leading dimensions
    constant: Tensor  # (a,)
    mean: Tensor  # (a, d)
    root: Tensor  # (a, d, d)

    @classmethod
    def of(cls, lookup: AliveComponents) -> "Screening":
        posterior, alive = lookup.posterior, lookup.alive
        constant = posterior.constant()[alive]
        mean, root = posterior.mean[alive], posterior.root[alive]
        leading = Full(_LEADING).coefficients(mean[:, :_LEADING], root[:, :_LEADING, :_LEADING])
        leading[0] += constant
        return cls(lookup=lookup, leading=leading, constant=constant, mean=mean, root=root)

    def ask(self, chunk: Chunk) -> ChunkResponsibilities:
        """Return the result of `ask_all` for a chunk, up to rounding."""
        at_most = Full(_LEADING).features(chunk.x[:, :_LEADING]) @ self.leading  # (b, a)
        for table, values in zip(self.lookup.log_categories, chunk.categories, strict=True):
            at_most += table[values]
        near = at_most > self._best(chunk, at_most)[:, None] - _FAR
        if near.sum() > _MOST_SHARE * near.numel():
            return ask_all(chunk, self.lookup)
        joint = at_most.fill_(-torch.inf)
        pairs = list(_by_component(near))
        for component, rows in pairs:
            joint[rows, component] = self._log_joint(chunk, component, rows)
        log_joint = joint.clone()
        normaliser = normalise_(joint)
        sums = self._summed(chunk, pairs, joint, log_joint, normaliser)
        return ChunkResponsibilities(responsibility=joint, normaliser=normaliser, sums=sums)

    def _best(self, chunk: Chunk, at_most: Tensor) -> Tensor:
        """Return a lower bound (b,) of each point's best log joint.

        It is the log joint with the component of the highest upper bound. Components far below it are negligible.
        """
        promising = at_most.argmax(dim=1)
        best = at_most.new_empty(len(at_most))
        order = promising.argsort()
        for component, rows in enumerate(
            torch.split(order, torch.bincount(promising, minlength=at_most.shape[1]).tolist())
        ):
            if len(rows):
                best[rows] = self._log_joint(chunk, component, rows)
        return best

    def _log_joint(self, chunk: Chunk, component: int, rows: Tensor) -> Tensor:
        distance = ((chunk.x[rows] - self.mean[component]) @ self.root[component]).square_().sum(dim=1)
        joint = distance.mul_(-0.5).add_(self.constant[component])
        for table, values in zip(self.lookup.log_categories, chunk.categories, strict=True):
            joint += table[values[rows], component]
        return joint

    def _summed(
        self,
        chunk: Chunk,
        pairs: Sequence[tuple[int, Tensor]],
        responsibility: Tensor,
        log_joint: Tensor,
        normaliser: Tensor,
    ) -> Sums:
        prior, alive = self.lookup.posterior.prior, self.lookup.alive
        dim = prior.dim
        sums = Sums.none(
            prior.components,
            prior.shape.width(),
            dim,
            [len(table) for table in self.lookup.log_categories],
            chunk.x.device,
        )
        i, j = torch.triu_indices(dim, dim, device=chunk.x.device)
        expected = torch.zeros((), dtype=torch.float64, device=chunk.x.device)
        for component, rows in pairs:
            share, x = responsibility[rows, component], chunk.x[rows]
            expected += share @ log_joint[rows, component]
            weighted = share[:, None] * x
            row = sums.features[alive[component]]
            row[0] = share.sum()
            row[1 : 1 + dim] = weighted.sum(dim=0)
            row[1 + dim :] = (x.T @ weighted)[i, j]
        for whole, values in zip(sums.categories, chunk.categories, strict=True):
            whole[:, alive] = torch.zeros(len(whole), len(alive), dtype=whole.dtype, device=whole.device).index_add_(
                0, values, responsibility
            )
        return sums.of([sums.features, sums.scatter, normaliser.sum() - expected, *sums.categories])


def _by_component(near: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each component that is near any point, with these points' rows."""
    component, row = near.T.nonzero(as_tuple=True)
    counts = torch.bincount(component, minlength=near.shape[1]).tolist()
    for number, rows in enumerate(torch.split(row, counts)):
        if len(rows):
            yield number, rows


def make_evaluator(posterior: Posterior) -> Callable[[Chunk], ChunkResponsibilities]:
    """Return the cheaper function that evaluates a posterior on a chunk."""
    lookup = AliveComponents.of(posterior)
    if posterior.prior.kind == "full" and posterior.prior.dim >= LEAST_DIM:
        return Screening.of(lookup).ask
    return partial(ask_all, lookup=lookup)
