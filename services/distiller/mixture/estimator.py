"""The mixture as an estimator in scikit-learn's style."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

from services.arrays import Array
from services.distiller.mixture import init
from services.distiller.mixture.covariances import SHAPES, CovarianceType, reduced
from services.distiller.mixture.data import Chunk, Coordinates, Points, Rows, definite
from services.distiller.mixture.e_step import LEAST_DIM, normalise_
from services.distiller.mixture.em import EMLoop
from services.distiller.mixture.fit_state import Fit, FitState
from services.distiller.mixture.init import Start
from services.distiller.mixture.parallel import Reducer
from services.distiller.mixture.posterior import Prior

# Blocks of a memoized pass, and the fewest points that justify one.
_BLOCKS, _LEAST_BLOCK = 8, 4_000
# How often a prior is learned and the fit continued.
_LEARNINGS = 2
_CHUNK = 2_048
_CHUNK_ON_GPU = 65_536


class DirichletProcessMixture:
    """A Dirichlet-process mixture of Gaussians, fitted by variational Bayes.

    It may have categorical factors. Parameters shared with scikit-learn's BayesianGaussianMixture have the same
    meaning, and with `moves=False, blocks=1` every iteration gives the same result as there. New parameters:
    `category_concentration` is that of the Dirichlet prior of each categorical factor: below 1, components that mix
    values are unlikely. `moves` merges, splits and sorts components, which finds a higher bound. `learn_prior` learns
    the expected shape of a component from the components found, and continues: this separates small components that the
    default prior, as wide as all data, merges with their neighbours. `blocks` is the number of updates of the posterior
    in one pass over the data. `threads`, `device` and `chunk_size` change results by rounding alone, as does `group`, a
    torch.distributed group whose processes each hold a part of the rows.

    After `fit`: `weights_` (K,), `means_` (K, d), `covariances_` (shape by type),
    `precisions_cholesky_`, `weight_concentration_`, `mean_precision_`,
    `degrees_of_freedom_`, `categories_` (for each factor a (c, K) array of
    probabilities), `counts_` (K,) points of each component, `lower_bound_`,
    `lower_bounds_`, `converged_`, `n_iter_`, `n_features_in_`; and of the prior,
    possibly learned, `mean_precision_prior_`, `degrees_of_freedom_prior_`,
    `covariance_prior_` (d, d).
    """

    def __init__(
        self,
        *,
        n_components: int = 100,
        covariance_type: CovarianceType = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 500,
        n_init: int = 1,
        init_params: Start = "kmeans",
        weight_concentration_prior_type: Literal["dirichlet_process", "dirichlet_distribution"] = "dirichlet_process",
        weight_concentration_prior: float | None = None,
        mean_precision_prior: float | None = None,
        mean_prior: Array | None = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: Array | float | None = None,
        category_concentration: float = 0.1,
        moves: bool = True,
        learn_prior: bool = False,
        blocks: int | None = None,
        random_state: int = 0,
        threads: int | None = None,
        device: str = "cpu",
        chunk_size: int | None = None,
        group: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weight_concentration_prior_type = weight_concentration_prior_type
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.category_concentration = category_concentration
        self.moves = moves
        self.learn_prior = learn_prior
        self.blocks = blocks
        self.random_state = random_state
        self.threads = threads
        self.device = device
        self.chunk_size = chunk_size
        self.group = group

    def fit(
        self,
        X: Rows,
        *,
        categories: Sequence[Array] = (),
        category_sizes: Sequence[int] | None = None,
        responsibilities: Array | None = None,
        check: Callable[[float], None] = lambda _: None,
    ) -> "DirichletProcessMixture":
        """Fit the mixture to points (n, d).

        `X` is an array or an object sliced like one, such as a memory map of any length. `categories` are arrays (n,)
        of class ids, one for each factor; `category_sizes` is the number of classes of each, when there may be more
        than occur here. `responsibilities` (n, K) are the start, in place of `init_params`. `check` is called with the
        bound after every pass over the data, and may raise to stop. Raises ValueError for invalid data or parameters.
        """
        reducer, ascent = self._reducer(), EMLoop(moves=self.moves, tol=self.tol, max_iter=self.max_iter)
        points = self._points(X, categories, category_sizes, reducer)
        with reducer.workers():
            best: FitState | None = None
            for number in range(1 if responsibilities is not None else self.n_init):
                fit, state = self._begin(points, reducer, number, responsibilities, check)
                ascent.run(fit, state, self._generator(number))
                if best is None or state.bound > best.bound:
                    best, chosen = state, fit
            assert best is not None
            for number in range(_LEARNINGS if self.learn_prior else 0):
                chosen = ascent.learn(chosen, best, self._generator(number))
        self._keep(best, chosen)
        return self

    def predict(self, X: Rows, *, categories: Sequence[Array] = ()) -> Array:
        """Return the likeliest component of each point, (n,)."""
        return self._asked(X, categories, lambda joint: joint.argmax(dim=1))

    def predict_proba(self, X: Rows, *, categories: Sequence[Array] = ()) -> Array:
        """Return the responsibility of every component for each point, (n, K)."""

        def shares(joint: Tensor) -> Tensor:
            normalise_(joint)
            return joint

        return self._asked(X, categories, shares)

    def score_samples(self, X: Rows, *, categories: Sequence[Array] = ()) -> Array:
        """Return the expected log density (n,) of each point, as in scikit-learn."""
        return self._asked(X, categories, normalise_)

    def sample(self, n_samples: int = 1, *, random_state: int = 0) -> tuple[Array, Array]:
        """Draw points (n, d) and their components (n,)."""
        generator = np.random.default_rng(random_state)
        labels = np.sort(generator.choice(len(self.weights_), n_samples, p=self.weights_))
        covariances = self._matrices()
        parts = [
            generator.multivariate_normal(self.means_[k], covariances[k], int((labels == k).sum()), method="cholesky")
            for k in np.unique(labels)
        ]
        return np.concatenate(parts), labels

    def fit_predict(self, X: Rows, *, categories: Sequence[Array] = ()) -> Array:
        """Fit the mixture and return the likeliest component of each point, (n,)."""
        return self.fit(X, categories=categories).predict(X, categories=categories)

    def _points(self, X: Rows, categories: Sequence[Array], sizes: Sequence[int] | None, reducer: Reducer) -> Points:
        if len(X.shape) != 2 or not all(X.shape):
            raise ValueError(f"X has shape {tuple(X.shape)}: give points (n, d), at least one")
        if self.n_components < 1:
            raise ValueError(f"n_components is {self.n_components}: give 1 or more")
        if self.covariance_type not in SHAPES:
            raise ValueError(f"covariance_type is {self.covariance_type!r}: give one of {', '.join(SHAPES)}")
        for values in categories:
            if len(values) != X.shape[0] or np.min(values) < 0:
                raise ValueError(
                    f"{len(values)} values of a category for {X.shape[0]} points: give class ids from 0, (n,)"
                )
        seen = reducer.largest([1 + int(np.max(values)) for values in categories])
        if sizes is not None and any(size < most for size, most in zip(sizes, seen, strict=True)):
            raise ValueError(f"category_sizes are {list(sizes)}, but class ids go up to {[most - 1 for most in seen]}")
        device = torch.device(self.device)
        return Points(
            x=X,
            categories=categories,
            sizes=seen if sizes is None else list(sizes),
            chunk_size=self.chunk_size or (_CHUNK if device.type == "cpu" else _CHUNK_ON_GPU),
            device=device,
        )

    def _reducer(self) -> Reducer:
        threads = self.threads or (torch.get_num_threads() if self.device == "cpu" else 1)
        return Reducer(threads, self.group)

    def _begin(
        self,
        points: Points,
        reducer: Reducer,
        number: int,
        responsibilities: Array | None,
        check: Callable[[float], None],
    ) -> tuple[Fit, FitState]:
        mean, covariance = points.moments(reducer)
        covariance = definite(covariance)
        coordinates = Coordinates.of(mean, covariance, self.covariance_type)
        fit = self._fit_in(points, reducer, coordinates, covariance, mean, check)
        sums = self._started(fit, number, responsibilities)
        if self.covariance_type == "full" and points.dim >= LEAST_DIM:
            # Sorted by how much components differ in a dimension: screening evaluates the leading dimensions.
            total = sum((block.features for block in sums), torch.zeros_like(sums[0].features))
            means = total[:, 1 : 1 + points.dim] / total[:, :1].clamp_min(1.0)
            turn = torch.linalg.eigh((total[:, :1] * means).T @ means)[1].flip(1)
            fit = self._fit_in(points, reducer, coordinates.turned(turn), covariance, mean, check)
            sums = self._started(fit, number, responsibilities)
        return fit, fit.begin(sums)

    def _started(self, fit: Fit, number: int, responsibilities: Array | None) -> list[Any]:
        if responsibilities is not None:
            return init.given_sums(fit, torch.as_tensor(responsibilities))
        return init.initial_sums(fit, self.init_params, self._generator(number))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.random_state + number)

    def _fit_in(
        self,
        points: Points,
        reducer: Reducer,
        coordinates: Coordinates,
        covariance: Tensor,
        mean: Tensor,
        check: Callable[[float], None],
    ) -> Fit:
        inside = replace(points, coordinates=coordinates)
        (count,) = reducer.total([torch.tensor(float(len(points)), dtype=torch.float64)])
        most = self.blocks or min(_BLOCKS, max(int(count) // _LEAST_BLOCK, 1))
        return Fit(
            points=inside,
            prior=self._prior(coordinates, covariance, mean),
            reducer=reducer,
            blocks=inside.blocks(most),
            count=int(count),
            check=check,
        )

    def _prior(self, coordinates: Coordinates, covariance: Tensor, mean: Tensor) -> Prior:
        kind, dim = self.covariance_type, len(mean)
        eye = torch.eye(dim, dtype=torch.float64, device=mean.device)
        centre = mean if self.mean_prior is None else torch.as_tensor(self.mean_prior, dtype=torch.float64)
        degrees = float(dim) if self.degrees_of_freedom_prior is None else float(self.degrees_of_freedom_prior)
        if degrees <= dim - 1:
            raise ValueError(
                f"degrees_of_freedom_prior is {degrees:g}: give more than {dim - 1}, the dimensions less one"
            )
        prior_covariance = covariance
        if self.covariance_prior is not None:
            given = torch.as_tensor(self.covariance_prior, dtype=torch.float64)
            prior_covariance = given if given.ndim == 2 else torch.diag(given.expand(dim))
        return Prior(
            kind=kind,
            components=self.n_components,
            process=self.weight_concentration_prior_type == "dirichlet_process",
            concentration=self.weight_concentration_prior or 1.0 / self.n_components,
            mean_precision=1.0 if self.mean_precision_prior is None else self.mean_precision_prior,
            mean=coordinates.enter(centre[None].to(mean.device))[0],
            degrees_of_freedom=degrees,
            covariance=reduced(coordinates.enter_covariance(prior_covariance), kind),
            ridge=reduced(coordinates.enter_covariance(self.reg_covar * eye), kind),
            log_determinant=coordinates.log_determinant,
            category_concentration=self.category_concentration,
        )

    def _keep(self, state: FitState, fit: Fit) -> None:
        posterior, coordinates = state.posterior, fit.points.coordinates
        assert coordinates is not None
        kind, dim = self.covariance_type, fit.points.dim
        covariance = coordinates.leave_covariance(posterior.prior.shape.expand(posterior.covariance))
        kept = reduced(covariance, kind)
        self._posterior, self._inside = posterior, fit.points
        self.weights_ = posterior.weights().cpu().numpy()
        self.means_ = coordinates.leave(posterior.mean).cpu().numpy()
        self.covariances_ = kept.cpu().numpy()
        self.precisions_cholesky_ = posterior.prior.shape.precision_root(kept).cpu().numpy()
        prior = posterior.prior
        self.mean_precision_prior_, self.degrees_of_freedom_prior_ = prior.mean_precision, prior.degrees_of_freedom
        prior_covariance = coordinates.leave_covariance(prior.shape.expand(_one(prior.covariance, kind)))
        self.covariance_prior_ = prior_covariance.reshape(dim, dim).cpu().numpy()
        self.mean_precision_ = posterior.mean_precision.cpu().numpy()
        self.degrees_of_freedom_ = posterior.degrees_of_freedom.cpu().numpy()
        self.weight_concentration_ = tuple(part.cpu().numpy() for part in posterior.concentration)
        self.categories_ = [_probabilities(count, self.category_concentration) for count in state.sums.categories]
        self.counts_ = state.sums.count.cpu().numpy()
        self.lower_bound_, self.lower_bounds_, self.n_iter_ = state.bound, state.bounds, state.iteration
        self.converged_, self.n_features_in_ = state.converged, dim

    def _asked(self, X: Rows, categories: Sequence[Array], of: Callable[[Tensor], Tensor]) -> Array:
        """Return the results (n, ...) of a function of log joints, for all points.

        The function maps the expected log joints (b, K) of a chunk to its results.
        """
        if not hasattr(self, "_posterior"):
            raise NotFittedError("this mixture is not fitted yet: call fit first")
        if len(X.shape) != 2 or X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has shape {tuple(X.shape)}: give points (n, {self.n_features_in_}), as they were fitted"
            )
        if len(categories) != len(self.categories_):
            raise ValueError(
                f"{len(categories)} categories are given: give {len(self.categories_)}, as they were fitted"
            )
        for values, size in zip(categories, self._inside.sizes, strict=True):
            if len(values) and np.max(values) >= size:
                raise ValueError(
                    f"class id {np.max(values)} was not known to the fit, which has {size}: give category_sizes"
                )
        posterior = self._posterior
        points = replace(self._inside, x=X, categories=categories)
        coefficients = posterior.coefficients()

        def ask(chunk: Chunk) -> Tensor:
            joint = posterior.prior.shape.features(chunk.x) @ coefficients
            for table, values in zip(posterior.log_categories, chunk.categories, strict=True):
                joint += table[values]
            return of(joint + posterior.prior.shape.common(chunk.x, posterior.root)).cpu()

        with (reducer := Reducer(self._reducer().threads)).workers():
            return np.concatenate([part.numpy() for part in reducer.each(ask, points.makers())])

    def _matrices(self) -> Array:
        """Return the covariances as matrices (K, d, d)."""
        kept, dim = torch.as_tensor(self.covariances_), self.n_features_in_
        matrices = SHAPES[self.covariance_type](dim).expand(kept)
        return matrices.expand(len(self.weights_), dim, dim).numpy()


def _one(covariance: Tensor, kind: CovarianceType) -> Tensor:
    """Return one covariance in the shape that its type expects."""
    return covariance if kind == "tied" else covariance[None]


def _probabilities(count: Tensor, concentration: float) -> Array:
    first = concentration + count
    return (first / first.sum(dim=0)).cpu().numpy()
