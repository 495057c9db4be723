"""What calm traffic looks like: the test split of a guard's run, which neither VAE nor regions were fitted to."""

import numpy as np
from scipy.stats import beta

from services.arrays import Array
from services.distiller.guard_model import GuardModel, top_predictions
from services.statistics.intervals import clopper_pearson
from services.storage.catalog import LabelledImages
from services.triton.client import Classifier

# Images that calm is told from: bounds time.
_MOST_IMAGES = 10_000
# Sets the draw of these apart from others of the same seed.
_STREAM = 0x4C4F4F4B
# Probability that a calm rate lies above its bound, over all rates of a kind.
_ABOVE = 0.01


def reference_profile(guard_model: GuardModel, classifier: Classifier, data: LabelledImages) -> dict[str, Array]:
    """Return what m labelled images look like through a guard and a version of its model.

    images (1,): m. hits (k,): how many are inside of each region; hits_low and hits_high (k,), ends of the share's 95 %
    interval; hits_bound (k,), which the true shares exceed with a probability of 0.01 at most. predicted (c,) and
    predicted_bound (c,): the same of the predicted classes. typicality (m,), ascending. correct (1,): how many are
    read correctly; confidence (1,): the value that as many exceed (Garg et al., 2022). error_rate (k,): of the regions,
    by the version that was searched, searched_version (1,); recall (1,): the guard's.
    """
    seen, read = guard_model.look(data.images), top_predictions(classifier.classify_stored(data.images))
    count = len(data.labels)
    hits = np.bincount(seen["index"][seen["inside"] > 0], minlength=len(guard_model.guard.regions))
    predicted = np.bincount(read["predicted"], minlength=len(guard_model.model.classes))
    correct = int((read["predicted"] == data.labels).sum())
    low, high = np.array([clopper_pearson(int(number), count) for number in hits]).T
    return {
        "images": np.array([count]),
        "hits": hits,
        "hits_low": low,
        "hits_high": high,
        "hits_bound": _bounds(hits, count),
        "predicted": predicted,
        "predicted_bound": _bounds(predicted, count),
        "typicality": np.sort(seen["typicality"]),
        "correct": np.array([correct]),
        "error_rate": np.array([guard_model.error_rate(region.region) for region in guard_model.guard.regions]),
        "searched_version": np.array([guard_model.run.config.model_version]),
        "recall": np.array([guard_model.guard.recall.value]),
        "confidence": np.sort(read["confidence"])[[count - correct - 1]]
        if correct < count
        else np.zeros(1, np.float32),
    }


def reference_images(guard_model: GuardModel) -> LabelledImages:
    """Return images of the test split, the same ones each time."""
    split = guard_model.split("test")
    generator = np.random.default_rng([guard_model.run.config.seed, _STREAM])
    count = min(_MOST_IMAGES, len(split.labels))
    rows = np.sort(generator.choice(len(split.labels), size=count, replace=False))
    return LabelledImages(images=split.images[rows], labels=split.labels[rows])


def _bounds(counts: Array, trials: int) -> Array:
    """Return upper bounds (k,) of shares that hold together (Clopper and Pearson, 1934; Bonferroni)."""
    above = _ABOVE / max(1, len(counts))
    return np.where(counts < trials, beta.ppf(1 - above, counts + 1, np.maximum(trials - counts, 1)), 1.0)
