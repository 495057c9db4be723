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
    random = np.random.default_rng(0)
    drawn = random.integers(len(failures["source"]), size=min(_DRAWN, 50 * len(failures["source"])))
    latent = failures["latent"][drawn].astype(np.float64)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = BayesianGaussianMixture(n_components=min(_COMPONENTS, len(latent)), random_state=0).fit(latent)
    seconds = time.perf_counter() - begin
    component = model.predict(failures["latent"].astype(np.float64))
    confusion = failures["true_label"].astype(np.int64) * (1 << 20) + failures["predicted_label"]
    heavy = [confusion[component == k] for k in np.flatnonzero(model.weights_ > _LEAST_WEIGHT)]
    largest = [int(np.unique(members, return_counts=True)[1].max()) for members in heavy if len(members)]
    total = sum(len(members) for members in heavy)
    return {
        "released_regions": len(heavy),
        "released_purity": round(sum(largest) / total, 3) if total else 0.0,
        "released_s": round(seconds, 1),
    }
