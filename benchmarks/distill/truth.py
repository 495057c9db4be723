"""Whether what is found is what was planted."""

import warnings
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import BayesianGaussianMixture

from benchmarks.distill.clouds import Array, planted
from benchmarks.distill.sizes import Sizes
from services.distiller.mixture import DirichletProcessMixture

# A component is that of a planted one if they share more than half of all points that either has.
_MATCHED = 0.5


def recovery(sizes: Sizes) -> dict[str, Any]:
    """Compare with planted mixtures; the adjusted Rand index is a share of the true parameters' index.

    Ours learns its prior; its result with scikit-learn's prior stands beside it. `bound_over_planted` is that result's
    bound minus the bound of plain iterations from the planted labels: when it is not below 0 and a planted component is
    missing, the evidence under that prior prefers fewer components.
    """
    figures: list[dict[str, float]] = []
    for number, (components, dim, apart) in enumerate(sizes.mixtures):
        x, label, attainable = planted(
            components=components, dim=dim, points=sizes.mixture_points, apart=apart, seed=number
        )
        settings: dict[str, Any] = {"n_components": sizes.components, "random_state": number, "max_iter": 200}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = DirichletProcessMixture(**settings).fit(x)
            learned = DirichletProcessMixture(**settings, learn_prior=True).fit(x)
            theirs = BayesianGaussianMixture(**settings).fit_predict(x)
            from_truth = DirichletProcessMixture(**settings, moves=False).fit(
                x, responsibilities=_by_size(label, sizes.components)
            )
        ours, default = learned.predict(x), model.predict(x)
        best = adjusted_rand_score(label, attainable)
        figures.append(
            {
                "ari_of_attainable": adjusted_rand_score(label, ours) / best,
                "reference_ari_of_attainable": adjusted_rand_score(label, theirs) / best,
                "ari_of_attainable_default_prior": adjusted_rand_score(label, default) / best,
                "components_found": _matched(label, ours) / components,
                "components_found_default_prior": _matched(label, default) / components,
                "components_attainable": _matched(label, attainable) / components,
                "reference_components_found": _matched(label, theirs) / components,
                "bound_over_planted": model.lower_bound_ - from_truth.lower_bound_,
            }
        )
    return {
        **{name: [round(figure[name], 3) for figure in figures] for name in figures[0]},
        "components_found_mean": round(float(np.mean([figure["components_found"] for figure in figures])), 3),
        "mixtures": [list(mixture) for mixture in sizes.mixtures],
    }


def _by_size(label: Array, components: int) -> Array:
    """Return responsibilities (n, K) of labels, the most frequent first, as sticks expect them."""
    rank = np.argsort(np.argsort(-np.bincount(label), kind="stable"), kind="stable")
    shares = np.zeros((len(label), components))
    shares[np.arange(len(label)), rank[label]] = 1.0
    return shares


def _matched(label: Array, found: Array) -> int:
    """Return how many planted components have a component of their own, matched one to one."""
    shared = np.zeros((label.max() + 1, found.max() + 1))
    np.add.at(shared, (label, found), 1)
    either = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0) - shared
    overlap = shared / np.maximum(either, 1)
    return int((overlap[linear_sum_assignment(-overlap)] > _MATCHED).sum())
