"""What a version reads correctly, with ONNX Runtime in this process: for the points that are never served."""

import numpy as np
from defuse.v1 import correction_pb2, model_pb2, tensor_pb2
from scipy.special import log_softmax

from services.corrector.augmentation import Array
from services.corrector.materials import HeldOut, Materials
from services.corrector.paired import PairedDifference
from services.runtime.catalog import LabelledImages
from services.runtime.inference import LEAST_PROBABILITY, as_floats, no_logits, preprocess
from services.runtime.intervals import estimate
from services.runtime.sessions import onnx_function

_BATCH = 256


class LocalVersion:
    """A version of a classifier, run here."""

    def __init__(self, file: bytes, model: model_pb2.Model) -> None:
        self._run, self._model = onnx_function(file), model

    def log_probabilities(self, images: Array) -> Array:
        """Return the log-probabilities (n, k) of images (n, c, h, w) in [0, 1]."""
        size = self._model.fixed_batch_size or _BATCH
        parts = [self._outputs(images[begin : begin + size]) for begin in range(0, len(images), size)]
        outputs = np.concatenate([no_logits(self._model), *parts])
        if self._model.output == model_pb2.Model.OUTPUT_PROBABILITIES:
            return np.asarray(np.log(np.maximum(outputs, LEAST_PROBABILITY)))
        return np.asarray(log_softmax(outputs, axis=1))

    def reads_stored_correctly(self, data: LabelledImages) -> Array:
        """Say for stored images whether they are read as their labels, (n,); bounds the memory of one call."""
        slices = [slice(begin, begin + _BATCH) for begin in range(0, len(data.labels), _BATCH)]
        answers = [self.log_probabilities(as_floats(data.images[part])).argmax(axis=1) for part in slices]
        return np.asarray(np.concatenate([np.zeros(0, np.int64), *answers]) == data.labels)

    def _outputs(self, images: Array) -> Array:
        rows = np.resize(np.arange(len(images)), self._model.fixed_batch_size or len(images))
        return np.asarray(self._run(preprocess(images[rows], self._model))[0][: len(images)])


class Yardstick:
    """Measures points: on the test split, beside the base version, and on the region images that decide."""

    def __init__(self, materials: Materials) -> None:
        self._materials = materials
        base = LocalVersion(materials.deployed_file, materials.model)
        self._before = base.reads_stored_correctly(materials.test)
        deciding = [*materials.held_out_regions(deciding=True), *materials.around_regions()]
        self._images, self._labels = images_of(materials, deciding)

    def measure(self, file: bytes) -> correction_pb2.Point:
        """Return the figures of a version."""
        version = LocalVersion(file, self._materials.model)
        after = version.reads_stored_correctly(self._materials.test)
        answers = version.log_probabilities(self._images)
        losses = -answers[np.arange(len(self._labels)), self._labels]
        return correction_pb2.Point(
            test=share_of(after),
            test_change=difference_between(self._before, after),
            regions=share_of(answers.argmax(axis=1) == self._labels),
            regions_loss=float(losses.mean()) if len(losses) else 0.0,
        )


def images_of(materials: Materials, regions: list[HeldOut]) -> tuple[Array, Array]:
    """Return the images (n, c, h, w) of latents of regions, and their labels (n,)."""
    images = [materials.decoded(region.latent) for region in regions]
    labels = [np.full(len(region.latent), region.label_id, np.int64) for region in regions]
    return np.concatenate(images), np.concatenate(labels)


def share_of(correct: Array) -> tensor_pb2.Estimate:
    return estimate(int(correct.sum()), len(correct))


def difference_between(before: Array, after: Array) -> correction_pb2.PairedDifference:
    """Return what changed over the same images, each (n,) bool."""
    difference = PairedDifference(
        gained=int((after & ~before).sum()), lost=int((before & ~after).sum()), trials=len(before)
    )
    low, high = difference.interval()
    return correction_pb2.PairedDifference(
        value=difference.value,
        low=low,
        high=high,
        gained=difference.gained,
        lost=difference.lost,
        trials=difference.trials,
        p_value=difference.p_value(),
    )
