"""The scoring stage: scores of reported batches, and the reference profile.

A guard scores the batches. The reference profile is the distribution of scores that they are compared with.
"""

import functools
from collections.abc import Sequence

import numpy as np
from defuse.errors import NotFound
from defuse.guard_outputs import INDEX, INSIDE, OUTPUTS, RISK, TYPICALITY
from defuse.v1 import guard_pb2, model_pb2, monitor_pb2, run_pb2, work_pb2
from scipy.special import softmax
from scipy.stats import beta

from services.arrays import Array, as_floats
from services.distiller.assessment import DistillerDependencies
from services.latent_space.run_images import RunImages
from services.onnx_graph.onnx_files import onnx_function
from services.runtime.worker import Job
from services.statistics.hypothesis_tests import clopper_pearson
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages
from services.triton.client import Classifier
from services.triton.preprocessing import preprocess

# Images that a guard scores at once.
_BATCH = 256


class GuardModel:
    """Scores stored images with a guard."""

    def __init__(self, store: ArtifactStore, guard_name: str, model: model_pb2.Model) -> None:
        self._catalog = Catalog(store)
        self.guard: guard_pb2.Guard = self._catalog.guard(guard_name)
        self.run: run_pb2.Run = self._catalog.run(self.guard.run)
        self.model = model
        self._run_guard = onnx_function(store.read_bytes(keys.onnx_file(guard_name)))
        self._encode = RunImages(store, self.run).encode

    def look(self, images: Array) -> dict[str, Array]:
        """Return the guard's scores of stored images (n, h, w, c).

        They are index, inside, risk and typicality (n,), and latent (n, d).
        """
        size = self.model.fixed_batch_size or _BATCH
        parts = [self._part(images[begin : begin + size], size) for begin in range(0, len(images), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def split(self, name: str) -> LabelledImages:
        """Return a split of the data set of the guard's run."""
        return self._catalog.split(self.run.config.dataset, name, self.model)

    def error_rate(self, region: str) -> float:
        """Return the error rate of the searched version in a region."""
        return float(self._catalog.region(region).error_rate.value)

    def _part(self, images: Array, size: int) -> dict[str, Array]:
        floats = as_floats(images)
        rows = np.resize(np.arange(len(images)), size if self.model.fixed_batch_size else len(images))
        answers = dict(zip(OUTPUTS, self._run_guard(preprocess(floats[rows], self.model)), strict=True))
        index, inside, risk, typicality = (
            answers[name][: len(images), 0] for name in (INDEX, INSIDE, RISK, TYPICALITY)
        )
        return {
            "index": index,
            "inside": inside.astype(np.uint8),
            "risk": risk,
            "typicality": typicality,
            "latent": self._encode(floats),
        }


def unscored(count: int) -> dict[str, Array]:
    """Return placeholder scores for images that could not be scored.

    They have the form of `GuardModel.look`, without latents.
    """
    return {
        "index": np.full(count, -1, np.int64),
        "inside": np.zeros(count, np.uint8),
        "risk": np.full(count, np.nan, np.float32),
        "typicality": np.full(count, np.nan, np.float32),
    }


def top_predictions(scores: Array) -> dict[str, Array]:
    """Return the predicted classes of logits (n, k), and their confidences.

    Both are (n,).
    """
    return {
        "predicted": scores.argmax(axis=1).astype(np.int64),
        "confidence": softmax(scores.astype(np.float64), axis=1).max(axis=1).astype(np.float32),
    }


def as_logits(scores: Array, model: model_pb2.Model) -> Array:
    """Return a model's answers (n, k) as logits."""
    if model.output == model_pb2.Model.OUTPUT_PROBABILITIES:
        return np.asarray(np.log(np.maximum(scores, np.finfo(np.float32).tiny)))
    return scores


def scatter_rows(parts: dict[str, Array], rows: Sequence[int] | Array, into: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays `into` with `parts` written to some rows.

    An array that only `parts` has is zero in all other rows.
    """
    count = len(next(iter(into.values())))
    whole = dict(into)
    for name, part in parts.items():
        target = whole.get(name, np.zeros((count, *part.shape[1:]), part.dtype)).copy()
        target[rows] = part
        whole[name] = target
    return whole


# Images of a reference profile: bounds time.
_MOST_IMAGES = 10_000
# Separates this draw from others of the same seed.
_STREAM = 0x4C4F4F4B
# Probability that a rate without change lies above its bound, over all rates of a kind.
_ABOVE = 0.01


def reference_profile(guard_model: GuardModel, classifier: Classifier, data: LabelledImages) -> dict[str, Array]:
    """Return the reference profile of m labelled images.

    It is computed with a guard and a version of its model. images (1,): m. hits (k,): images inside each region;
    hits_low and hits_high (k,): ends of the share's 95 % interval; hits_bound (k,): bounds that the true shares exceed
    with probability 0.01 at most. predicted (c,) and predicted_bound (c,): the same for the predicted classes.
    typicality (m,): ascending. correct (1,): correctly classified images; confidence (1,): the value that as many
    exceed (Garg et al., 2022). error_rate (k,): that of the searched version, searched_version (1,), in each region;
    recall (1,): the guard's.
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
    """Return a fixed sample of the test split."""
    split = guard_model.split("test")
    generator = np.random.default_rng([guard_model.run.config.seed, _STREAM])
    count = min(_MOST_IMAGES, len(split.labels))
    rows = np.sort(generator.choice(len(split.labels), size=count, replace=False))
    return LabelledImages(images=split.images[rows], labels=split.labels[rows])


def _bounds(counts: Array, trials: int) -> Array:
    """Return simultaneous upper bounds (k,) of shares (Clopper and Pearson, 1934).

    They are simultaneous by Bonferroni's correction.
    """
    above = _ABOVE / max(1, len(counts))
    return np.where(counts < trials, beta.ppf(1 - above, counts + 1, np.maximum(trials - counts, 1)), 1.0)


# Cached guards: models that are monitored at the same time.
_GUARDS = 4


class ObservationScorer:
    """The scoring stage, with a cache of the guards that it reads."""

    def __init__(self, dependencies: DistillerDependencies) -> None:
        self._dependencies = dependencies
        self._store: ArtifactStore = dependencies.store
        self._guard_model = functools.lru_cache(_GUARDS)(self._read)

    def watch(self, work: work_pb2.WatchWork, _: Job) -> work_pb2.Event:
        """Score a batch and store the scores.

        A batch that was deleted meanwhile is skipped.
        """
        if self._store.exists(keys.observed_images(work.batch)):
            self._watch(work)
        event = work_pb2.Event(subject=work.model)
        event.watched.batch, event.watched.guard = work.batch, work.guard
        return event

    def _watch(self, work: work_pb2.WatchWork) -> None:
        model = Catalog(self._store).model(work.model)
        arrays = self._store.read_arrays(keys.observed_images(work.batch))
        seen = _scores_only(arrays, model)
        # A batch that is delivered again may have lost its images, but not its scores.
        if work.guard and "image" in arrays:
            seen = self._of_images(arrays, seen, work.guard, model)
        if "image" in arrays or not self._store.exists(keys.observation_scores(work.batch)):
            self._store.write_arrays(keys.observation_scores(work.batch), seen)
        if work.latents_alone and "image" in arrays:
            kept = {name: array for name, array in arrays.items() if name != "image"}
            self._store.write_arrays(keys.observed_images(work.batch), kept)
        self._take_out_what_was_deleted(work.batch)

    def _take_out_what_was_deleted(self, batch: str) -> None:
        """Remove the scores of observations that were deleted meanwhile.

        The record no longer has these observations.
        """
        left = {keys.observation_digest(one.id) for one in self._record(batch).observations}
        for key in (keys.observation_scores(batch), keys.observed_images(batch)):
            arrays = self._store.read_arrays(key) if self._store.exists(key) else {"id": np.zeros((0, 16), np.uint8)}
            kept = np.array([row.tobytes() in left for row in arrays["id"]], bool)
            if not left:
                self._store.remove(key)
            elif not kept.all() and "image" not in arrays:
                self._store.write_arrays(key, {name: array[kept] for name, array in arrays.items()})

    def _record(self, batch: str) -> monitor_pb2.ObservationBatch:
        try:
            return self._store.read_message(keys.batch_record(batch), monitor_pb2.ObservationBatch)
        except NotFound:
            return monitor_pb2.ObservationBatch()

    def _of_images(
        self, arrays: dict[str, Array], seen: dict[str, Array], guard: str, model: model_pb2.Model
    ) -> dict[str, Array]:
        guard_model = self._guard_model(guard)
        if not self._store.exists(key := keys.guard_reference(guard)):
            classifier = self._dependencies.inference.classifier(model, version=model.champion_version)
            self._store.create_arrays(key, reference_profile(guard_model, classifier, reference_images(guard_model)))
        rows = np.flatnonzero(arrays["has_image"])  # images (m, h, w, c) have rows for these alone
        return scatter_rows(guard_model.look(arrays["image"]), rows, seen) if len(rows) else seen

    def _read(self, guard: str) -> GuardModel:
        model = Catalog(self._store).model("/".join(guard.split("/")[:2]))
        return GuardModel(self._store, guard, model)


def _scores_only(arrays: dict[str, Array], model: model_pb2.Model) -> dict[str, Array]:
    """Return predictions in the rows with reported scores, and placeholders elsewhere.

    The predicted class is -1 in rows without scores.
    """
    count = len(arrays["id"])
    unread: dict[str, Array] = {
        "predicted": np.full(count, -1, np.int64),
        "confidence": np.full(count, np.nan, np.float32),
    }
    rows = np.flatnonzero(arrays["has_scores"])
    read = top_predictions(as_logits(arrays["scores"][rows], model))
    return {"id": arrays["id"], **scatter_rows(read, rows, {**unscored(count), **unread})}
