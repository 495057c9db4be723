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
    """Compare with planted mixtures; the adjusted Rand index is told as a share of what the true parameters reach."""
    found: dict[str, list[float]] = {"ari_of_attainable": [], "reference_ari_of_attainable": [], "found": []}
    for number, (components, dim, apart) in enumerate(sizes.mixtures):
        x, label, attainable = planted(
            components=components, dim=dim, points=sizes.mixture_points, apart=apart, seed=number
        )
        best = adjusted_rand_score(label, attainable)
        settings: dict[str, Any] = {"n_components": sizes.components, "random_state": number, "max_iter": 200}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            ours = DirichletProcessMixture(**settings).fit_predict(x)
            theirs = BayesianGaussianMixture(**settings).fit_predict(x)
        found["ari_of_attainable"].append(round(adjusted_rand_score(label, ours) / best, 3))
        found["reference_ari_of_attainable"].append(round(adjusted_rand_score(label, theirs) / best, 3))
        found["found"].append(round(_matched(label, ours) / components, 3))
    return {
        **{name: values for name, values in found.items() if name != "found"},
        "components_found": found["found"],
        "mixtures": [list(mixture) for mixture in sizes.mixtures],
    }


def _matched(label: Array, found: Array) -> int:
    """Return how many planted components have a component of their own, matched one to one."""
    shared = np.zeros((label.max() + 1, found.max() + 1))
    np.add.at(shared, (label, found), 1)
    either = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0) - shared
    overlap = shared / np.maximum(either, 1)
    return int((overlap[linear_sum_assignment(-overlap)] > _MATCHED).sum())
