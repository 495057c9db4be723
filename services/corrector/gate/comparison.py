"""The comparison of a candidate with the champion, and the regression bank."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
import torch
from defuse import names
from defuse.errors import DeadlineExceeded, DefuseError, InvalidInput, Unavailable
from defuse.v1 import annotation_pb2, model_pb2
from scipy.special import log_softmax

from services.arrays import Array, as_floats, as_stored
from services.corrector.correction_data import RegionData, fresh_images, held_out_failures
from services.corrector.evaluation import LocalVersion
from services.corrector.gate import checks
from services.corrector.gate.checks import CheckResult
from services.latent_space.rendering import Perturbations
from services.latent_space.run_images import RunImages
from services.onnx_graph.module import OnnxModule
from services.statistics.hypothesis_tests import PairedReadings
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages
from services.triton.preprocessing import preprocess

# Images of one region: enough to show a loss of three in a hundred, few beside a test split.
IMAGES = 256
# At most so many of them are held-out failures; the others are fresh draws.
_HELD_OUT = 128
# Separates the draws of the bank from others of the same seed.
_STREAM = 0x42414E4B


class RegressionBank:
    """The regression bank: the labelled regions of all runs of a model.

    A candidate must not lose accuracy on any of them.
    """

    def __init__(self, store: ArtifactStore, model: model_pb2.Model) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._model = model

    def regions(self) -> Mapping[str, str]:
        """Return the present label of each annotated region, by region name.

        The names are `runs/{run}/regions/{region}`.
        """
        return {
            region.name: region.annotation.label
            for run in self._catalog.runs_of(self._model.name)
            for region in self._catalog.regions(run.name)
            if region.annotation.verdict == annotation_pb2.Annotation.VERDICT_LABEL
        }

    def images(self, region_name: str, label: str) -> Array:
        """Return the images (n, h, w, c) uint8 of a region.

        They are always the same, even after the region's run is deleted. Held-out
        failures come first, then fresh images of the region that carry the label: no
        correction was trained on either. No image is repeated, so there are
        fewer than `IMAGES` when few draws carry the label.
        """
        key = keys.regression_images(self._model.name, region_name, label)
        if not self._store.exists(key):
            self._store.create_arrays(key, {"images": self._drawn(region_name, label)})
        return self._store.read_arrays(key)["images"]

    def _drawn(self, region_name: str, label: str) -> Array:
        run = self._catalog.run(names.parent(region_name))
        arrays = self._store.read_arrays(keys.region_arrays(region_name))
        held_out = held_out_failures(arrays).take(slice(_HELD_OUT))
        images, label_id = RunImages(self._store, run), list(self._model.classes).index(label)
        fresh = fresh_images(
            images,
            RegionData.of(arrays, label_id),
            IMAGES - len(held_out),
            np.random.default_rng([run.config.seed, _STREAM]),
            of_source=lambda sources: sources.held_out,
        )
        drawn = Perturbations.joined([held_out, fresh])
        if not len(drawn):
            return np.zeros((0, *self._model.image_shape), np.uint8)
        return as_stored(images.render(drawn))


class Version(Protocol):
    """A version of a classifier, which maps images to logits."""

    model: model_pb2.Model
    # Whether Triton serves it.
    served: bool

    def classify(self, images: Array) -> Array:
        """Return the logits (n, k) of images (n, c, h, w) in [0, 1]."""

    def classify_stored(self, images: Array) -> Array:
        """Return the logits (n, k) of stored images (n, h, w, c) uint8."""


class FaultReportingVersion:
    """A candidate whose errors count as its own faults.

    They are raised as InvalidInput, except when Triton is unavailable or too slow.
    """

    def __init__(self, version: Version) -> None:
        self.model, self.served = version.model, version.served
        self._version = version

    def classify(self, images: Array) -> Array:
        return self._asked(self._version.classify, images)

    def classify_stored(self, images: Array) -> Array:
        return self._asked(self._version.classify_stored, images)

    def _asked(self, ask: Callable[[Array], Array], images: Array) -> Array:
        try:
            return ask(images)
        except (Unavailable, DeadlineExceeded):
            raise
        except DefuseError as error:
            raise InvalidInput(
                f"the candidate does not answer {len(images)} images: {error.message}", reason="NO_ANSWER"
            ) from error


@dataclass(frozen=True, kw_only=True)
class ServedCandidate:
    """A candidate with its name and version in Triton.

    The name is empty when the candidate runs in this process.
    """

    name: str
    version: int
    classifier: Version


# Turns for each batch size, their least number, and seconds after which further turns are left out.
_TURNS, _LEAST_TURNS, _MOST_S = 60, 8, 15.0
# Uncounted requests to each version before the first turn.
_WARM_UP = 3


def measure_latency(before: Version, after: Version, images: Array) -> tuple[Array, Array]:
    """Return the seconds (n,) that a request takes with each version.

    The versions alternate in n turns, and the order changes from turn to turn. A request has all images (m, c, h, w) in
    [0, 1].
    """
    versions = (before, after)
    for version in versions * _WARM_UP:
        version.classify(images)
    taken: list[list[float]] = [[], []]
    end = time.monotonic() + _MOST_S
    while len(taken[0]) < _TURNS and (len(taken[0]) < _LEAST_TURNS or time.monotonic() < end):
        first = len(taken[0]) % 2
        for position in (first, 1 - first):
            begin = time.perf_counter()
            versions[position].classify(images)
            taken[position].append(time.perf_counter() - begin)
    return np.array(taken[0]), np.array(taken[1])


# Images that are classified alone and in a batch.
_ALONE = 8
# Images of one request where the batch size is free: live callers wait behind it.
_FEW = 32
# Series of requests in which a candidate has to be slower, each of them, to be stopped for it.
_LATENCY_SERIES = 3
ReportProgress = Callable[[str], None]


class Comparison:
    """Two versions of a model, and their answers for the test split.

    Raises InvalidInput when the candidate's answers are not finite.
    """

    def __init__(self, before: Version, after: Version, test: LabelledImages) -> None:
        self.model: model_pb2.Model = before.model
        self.before, self.after = before, after
        self._labels = test.labels
        self._images = test.images
        logits = [_in_small_requests(version.classify_stored, test.images) for version in (before, after)]
        if wrong := int((~np.isfinite(logits[1])).any(axis=1).sum()):
            raise InvalidInput(
                f"the candidate's answers for {wrong} of {len(test.labels)} test images are not finite; look for "
                "weights that are not",
                reason="NOT_FINITE",
            )
        self._answers = [np.asarray(log_softmax(one, axis=1)) for one in logits]

    @property
    def test(self) -> PairedReadings:
        """Return the correctness of both versions on the test split."""
        before, after = (answers.argmax(axis=1) == self._labels for answers in self._answers)
        return PairedReadings(before=before, after=after)

    def region(self, images: Array, label_id: int) -> PairedReadings:
        """Return both versions' correctness on images of one class.

        Images (n, c, h, w) are in [0, 1].
        """
        before, after = (
            _in_small_requests(version.classify, images).argmax(axis=1) == label_id
            for version in (self.before, self.after)
        )
        return PairedReadings(before=before, after=after)

    def checks(
        self,
        bank: RegressionBank,
        file: bytes,
        *,
        gain: PairedReadings | None = None,
        report_progress: ReportProgress = lambda _: None,
    ) -> Iterator[CheckResult]:
        """Yield every check of a candidate with this ONNX file.

        `gain` has the readings on the corrected regions, or is None for a file that corrects none.
        """
        yield checks.accuracy_check(self.test)
        yield from checks.class_checks(self.test, self._labels, self.model.classes)
        before, after = self._answers
        yield checks.calibration_check(before, after, self._labels)
        if gain is not None:
            yield checks.gain_check(gain)
        report_progress("classifying images of labelled regions")
        yield from checks.region_checks(self._banked(bank))
        report_progress("comparing executions and measuring latency")
        yield from self._parities(file)
        yield from self._latencies()

    def _banked(self, bank: RegressionBank) -> dict[str, PairedReadings]:
        classes = list(self.model.classes)
        return {
            name: self.region(as_floats(bank.images(name, label)), classes.index(label))
            for name, label in bank.regions().items()
        }

    def _parities(self, file: bytes) -> Iterator[CheckResult]:
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

    def _latencies(self) -> Iterator[CheckResult]:
        sizes = self._batch_sizes()
        yield from map(self._latency, sorted({sizes[0], sizes[-1]}))

    def _latency(self, size: int) -> CheckResult:
        """Measure the latency in up to three series, until one passes.

        Other load slows a version in one series, but a slower file is slower in all of them.
        """
        images = self._request(size)
        for _ in range(_LATENCY_SERIES):
            check = checks.latency_check(size, *measure_latency(self.before, self.after, images))
            if check.passed:
                break
        return check

    def _batch_sizes(self) -> list[int]:
        fixed = self.model.fixed_batch_size
        return [fixed] if fixed else sorted({1, 2, self.model.max_batch_size})

    def _request(self, size: int) -> Array:
        """Return test images (size, c, h, w) in [0, 1], repeated if needed."""
        return as_floats(self._images[np.resize(np.arange(len(self._images)), size)])


def _in_small_requests(ask: Callable[[Array], Array], images: Array) -> Array:
    """Return the logits (n, k) of images, classified in small requests.

    Other callers' requests can run in between. n may be 0.
    """
    return np.concatenate([ask(images[begin : begin + _FEW]) for begin in range(0, max(1, len(images)), _FEW)])


def _network(file: bytes) -> OnnxModule | None:
    """Return the candidate's graph in torch.

    Returns None for a graph with an unsupported operator.
    """
    try:
        return OnnxModule(onnx.load_model_from_string(file)).eval()
    except ValueError:
        return None


def _torch_outputs(network: OnnxModule | None, inputs: Array) -> Array | None:
    """Return the outputs (n, k) of a graph in torch.

    Returns None when the graph is missing or cannot run.
    """
    if network is None:
        return None
    try:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(inputs)).numpy())
    except RuntimeError:
        return None
