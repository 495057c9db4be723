"""Evaluation of unserved versions with ONNX Runtime in this process."""

import numpy as np
from defuse.v1 import correction_pb2, model_pb2, tensor_pb2
from scipy.special import log_softmax

from services.arrays import Array, as_floats
from services.corrector.correction_data import CorrectionData, HeldOutRegion
from services.onnx_graph.onnx_files import onnx_function
from services.statistics.hypothesis_tests import PairedReadings
from services.storage.catalog import LabelledImages, estimate
from services.triton.client import LEAST_PROBABILITY
from services.triton.preprocessing import no_logits, preprocess

_BATCH = 256


class LocalVersion:
    """A version of a classifier that runs in this process."""

    served = False

    def __init__(self, file: bytes, model: model_pb2.Model) -> None:
        self._run, self.model = onnx_function(file), model

    def classify(self, images: Array) -> Array:
        """Return the logits (n, k) of images (n, c, h, w) in [0, 1].

        They are those of `triton.client.Classifier`.
        """
        size = self.model.fixed_batch_size or _BATCH
        parts = [self._answers(images[begin : begin + size]) for begin in range(0, len(images), size)]
        outputs = np.concatenate([no_logits(self.model), *parts])
        if self.model.output == model_pb2.Model.OUTPUT_PROBABILITIES:
            outputs = np.log(np.maximum(outputs, LEAST_PROBABILITY))
        return np.asarray(outputs, np.float32)

    def classify_stored(self, images: Array) -> Array:
        """Return the logits (n, k) of stored images (n, h, w, c) uint8.

        The images are classified in bounded batches.
        """
        parts = [self.classify(as_floats(images[begin : begin + _BATCH])) for begin in range(0, len(images), _BATCH)]
        return np.concatenate([no_logits(self.model), *parts])

    def log_probabilities(self, images: Array) -> Array:
        """Return the log-probabilities (n, k) of images (n, c, h, w) in [0, 1]."""
        return np.asarray(log_softmax(self.classify(images), axis=1))

    def reads_stored_correctly(self, data: LabelledImages) -> Array:
        """Return whether stored images are classified as their labels, (n,) bool."""
        return np.asarray(self.classify_stored(data.images).argmax(axis=1) == data.labels)

    def outputs(self, inputs: Array) -> Array:
        """Return the graph's outputs (n, k) for preprocessed inputs."""
        return self._run(inputs)[0]

    def _answers(self, images: Array) -> Array:
        rows = np.resize(np.arange(len(images)), self.model.fixed_batch_size or len(images))
        return np.asarray(self.outputs(preprocess(images[rows], self.model))[: len(images)])


class Evaluator:
    """Measures points on the test split and on deciding region images."""

    def __init__(self, correction_data: CorrectionData) -> None:
        self._correction_data = correction_data
        base = LocalVersion(correction_data.deployed_file, correction_data.model)
        self._before = base.reads_stored_correctly(correction_data.test)
        deciding = [*correction_data.held_out_regions(deciding=True), *correction_data.around_regions()]
        self._images, self._labels = region_images(correction_data, deciding)

    def measure(self, file: bytes) -> correction_pb2.Point:
        """Return the results of a version, given by its ONNX file."""
        version = LocalVersion(file, self._correction_data.model)
        after = version.reads_stored_correctly(self._correction_data.test)
        answers = version.log_probabilities(self._images)
        losses = -answers[np.arange(len(self._labels)), self._labels]
        return correction_pb2.Point(
            test=accuracy_estimate(after),
            test_change=accuracy_change(PairedReadings(before=self._before, after=after)),
            regions=accuracy_estimate(answers.argmax(axis=1) == self._labels),
            regions_loss=float(losses.mean()) if len(losses) else 0.0,
        )


def region_images(correction_data: CorrectionData, regions: list[HeldOutRegion]) -> tuple[Array, Array]:
    """Return the images (n, c, h, w) and labels (n,) of regions' perturbations."""
    images = [correction_data.rendered(region.perturbations) for region in regions]
    labels = [np.full(len(region.perturbations), region.label_id, np.int64) for region in regions]
    return np.concatenate(images), np.concatenate(labels)


def accuracy_estimate(correct: Array) -> tensor_pb2.Estimate:
    return estimate(int(correct.sum()), len(correct))


def accuracy_change(readings: PairedReadings) -> correction_pb2.PairedDifference:
    """Return the change of accuracy between two versions on the same images."""
    difference = readings.difference
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
