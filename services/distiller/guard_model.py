"""A guard's scores for stored images."""

from collections.abc import Sequence

import numpy as np
from defuse.guard_outputs import INDEX, INSIDE, OUTPUTS, RISK, TYPICALITY
from defuse.v1 import guard_pb2, model_pb2, run_pb2
from scipy.special import softmax

from services.arrays import Array, as_floats
from services.latent_space.autoencoder import read_encoder
from services.onnx_graph.onnx_files import onnx_function
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages
from services.triton.preprocessing import preprocess

_BATCH = 256


class GuardModel:
    """Scores stored images with a guard."""

    def __init__(self, store: ArtifactStore, guard_name: str, model: model_pb2.Model) -> None:
        self._catalog = Catalog(store)
        self.guard: guard_pb2.Guard = self._catalog.guard(guard_name)
        self.run: run_pb2.Run = self._catalog.run(self.guard.run)
        self.model = model
        self._run_guard = onnx_function(store.read_bytes(keys.onnx_file(guard_name)))
        self._encode = read_encoder(store, self.run.config)

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
