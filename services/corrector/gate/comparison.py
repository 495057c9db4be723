"""A candidate beside the version that callers get, on everything that is known of their model."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import torch
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2
from scipy.special import log_softmax

from services.corrector.augmentation import Array
from services.corrector.gate import checks, latency
from services.corrector.gate.bank import Bank
from services.corrector.gate.checks import Check
from services.corrector.gate.version import Version
from services.corrector.measuring import LocalVersion
from services.corrector.onnx_module import OnnxModule
from services.corrector.paired import Readings
from services.runtime.catalog import LabelledImages
from services.runtime.inference import as_floats, preprocess

# Images that are asked about alone and in a batch.
_ALONE = 8
# Images of one request, where what is asked is no batch size: live callers wait behind it.
_FEW = 32
# Series of requests in which a candidate has to be slower, each of them, to be stopped for it.
_LATENCY_SERIES = 3
Say = Callable[[str], None]


class Comparison:
    """Two versions of a model, and what they answer for the test split.

    Raises InvalidInput where the second one's answers are no numbers.
    """

    def __init__(self, before: Version, after: Version, test: LabelledImages) -> None:
        self.model: model_pb2.Model = before.model
        self.before, self.after = before, after
        self._labels = test.labels
        self._images = test.images
        logits = [_few_at_a_time(version.classify_stored, test.images) for version in (before, after)]
        if wrong := int((~np.isfinite(logits[1])).any(axis=1).sum()):
            raise InvalidInput(
                f"the candidate's answers for {wrong} of {len(test.labels)} test images are not finite; look for "
                "weights that are not",
                reason="NOT_FINITE",
            )
        self._answers = [np.asarray(log_softmax(one, axis=1)) for one in logits]

    @property
    def test(self) -> Readings:
        """What both read correctly of the test split."""
        before, after = (answers.argmax(axis=1) == self._labels for answers in self._answers)
        return Readings(before=before, after=after)

    def region(self, images: Array, label_id: int) -> Readings:
        """Return what both read correctly of images (n, c, h, w) in [0, 1] of one class."""
        before, after = (
            _few_at_a_time(version.classify, images).argmax(axis=1) == label_id for version in (self.before, self.after)
        )
        return Readings(before=before, after=after)

    def checks(
        self, bank: Bank, file: bytes, *, gain: Readings | None = None, say: Say = lambda _: None
    ) -> Iterator[Check]:
        """Yield every check of a candidate, whose ONNX file is given; `gain` where it corrects regions."""
        yield checks.accuracy_check(self.test)
        yield from checks.class_checks(self.test, self._labels, self.model.classes)
        before, after = self._answers
        yield checks.calibration_check(before, after, self._labels)
        if gain is not None:
            yield checks.gain_check(gain)
        say("asking about the regions of the bank")
        yield from checks.region_checks(self._banked(bank))
        say("comparing executions and measuring latency")
        yield from self._parities(file)
        yield from self._latencies()

    def _banked(self, bank: Bank) -> dict[str, Readings]:
        classes = list(self.model.classes)
        return {
            name: self.region(as_floats(bank.images(name, label)), classes.index(label))
            for name, label in bank.regions().items()
        }

    def _parities(self, file: bytes) -> Iterator[Check]:
        here, network = LocalVersion(file, self.model), _network(file)
        for size in self._batch_sizes():
            images = self._request(size)
            served = self.after.classify(images)
            if self.after.served:
                yield checks.parity_check("Triton and ONNX Runtime", size, served, here.classify(images))
            inputs = preprocess(images, self.model)
            if (read := _torch_outputs(network, inputs)) is not None:
                yield checks.parity_check("ONNX Runtime and torch", size, here.outputs(inputs), read)
            if size > 1:
                alone = np.concatenate([self.after.classify(images[row : row + 1]) for row in range(min(size, _ALONE))])
                yield checks.parity_check("alone and in a batch", size, served[:_ALONE], alone)

    def _latencies(self) -> Iterator[Check]:
        sizes = self._batch_sizes()
        yield from map(self._latency, sorted({sizes[0], sizes[-1]}))

    def _latency(self, size: int) -> Check:
        """Measure until a series passes, three at most: load slows a version for one series, a slower file for all."""
        images = self._request(size)
        for _ in range(_LATENCY_SERIES):
            check = checks.latency_check(size, *latency.seconds(self.before, self.after, images))
            if check.passed:
                break
        return check

    def _batch_sizes(self) -> list[int]:
        fixed = self.model.fixed_batch_size
        return [fixed] if fixed else sorted({1, 2, self.model.max_batch_size})

    def _request(self, size: int) -> Array:
        """Return test images (size, c, h, w) in [0, 1], repeated where there are fewer."""
        return as_floats(self._images[np.resize(np.arange(len(self._images)), size)])


def _few_at_a_time(ask: Callable[[Array], Array], images: Array) -> Array:
    """Return the logits (n, k) of images, also of none, asked so that others are answered in between."""
    return np.concatenate([ask(images[begin : begin + _FEW]) for begin in range(0, max(1, len(images)), _FEW)])


def _network(file: bytes) -> OnnxModule | None:
    """Return the candidate's graph in torch; None where it has an operator that torch does not read here."""
    try:
        return OnnxModule(onnx.load_model_from_string(file)).eval()
    except ValueError:
        return None


def _torch_outputs(network: OnnxModule | None, inputs: Array) -> Array | None:
    """Return the outputs (n, k) of a graph read in torch; None where it cannot be run there."""
    if network is None:
        return None
    try:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(inputs)).numpy())
    except RuntimeError:
        return None
