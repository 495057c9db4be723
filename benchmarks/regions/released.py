"""The released recipe on the same failures: scikit-learn's mixture over latents alone, heavy components kept."""

import time
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture

from benchmarks.stand import Array

# Its settings; it draws so many failures with replacement.
_COMPONENTS, _LEAST_WEIGHT, _DRAWN = 100, 0.01, 10_000


def released(failures: dict[str, Array]) -> dict[str, Any]:
    """Return how many regions it calls, how pure they are, and how long it takes."""
    if not len(failures["source"]):
        return {"released_regions": 0, "released_purity": 0.0, "released_s": 0.0}
    begin = time.perf_counter()
    heavy = heavy_components(failures)
    seconds = time.perf_counter() - begin
    confusion = failures["true_label"].astype(np.int64) * (1 << 20) + failures["predicted_label"]
    members = [confusion[rows] for _, _, rows in heavy]
    largest = [int(np.unique(rows, return_counts=True)[1].max()) for rows in members]
    total = sum(len(rows) for rows in members)
    return {
        "released_regions": len(heavy),
        "released_purity": round(sum(largest) / total, 3) if total else 0.0,
        "released_s": round(seconds, 1),
    }


def heavy_components(failures: dict[str, Array]) -> list[tuple[Array, Array, Array]]:
    """Return mean (d,), covariance (d, d) and the failures' positions of each component that it keeps."""
    random = np.random.default_rng(0)
    drawn = random.integers(len(failures["source"]), size=min(_DRAWN, 50 * len(failures["source"])))
    latent = failures["latent"][drawn].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = BayesianGaussianMixture(n_components=min(_COMPONENTS, len(latent)), random_state=0).fit(latent)
    component = model.predict(failures["latent"].astype(np.float64))
    heavy = [(k, np.flatnonzero(component == k)) for k in np.flatnonzero(model.weights_ > _LEAST_WEIGHT)]
    return [(model.means_[k], model.covariances_[k], rows) for k, rows in heavy if len(rows)]
