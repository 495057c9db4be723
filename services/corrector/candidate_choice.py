"""The choice stage of a correction.

The file with the chosen weights is served as the candidate and measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from defuse.errors import InvalidInput
from defuse.v1 import correction_pb2, work_pb2

from services.arrays import Array
from services.corrector.correction_data import CorrectionData, HeldOutRegion
from services.corrector.evaluation import accuracy_change, accuracy_estimate
from services.corrector.external_triton import AnyReleases
from services.corrector.gate.comparison import Comparison, Version
from services.corrector.gate.decision import Gate, join_readings, region_readings
from services.runtime.worker import Job
from services.statistics.hypothesis_tests import AccuracyDifference, PairedReadings
from services.storage import keys
from services.storage.artifacts import ArtifactStore

RULE = (
    "of the points whose test accuracy is non-inferior (the 95 % interval of the paired difference to the base version "
    "lies above -{margin:g}) the best on the region images that decide, held-out failures and fresh images around the "
    "regions: the largest accuracy, and of those whose 95 % interval reaches the largest, the smallest loss; where no "
    "point is non-inferior, the one with the least possible loss of test accuracy"
)


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """A point's results on deciding region images and on test images."""

    region_accuracy: float
    # Upper end of its interval.
    region_accuracy_high: float
    # Mean cross entropy.
    region_loss: float
    test_change: AccuracyDifference

    def is_non_inferior(self, margin: float) -> bool:
        """Return whether a loss of test accuracy beyond the margin is excluded."""
        return self.test_change.interval()[0] > -margin


@dataclass(frozen=True, kw_only=True)
class ChosenPoint:
    """The position of the chosen point, and whether it is non-inferior."""

    position: int
    non_inferior: bool


def choose(points: Sequence[MeasuredPoint], margin: float) -> ChosenPoint:
    """Choose a point by `RULE`, the first of equal ones.

    Among points whose accuracies hardly differ, the loss decides.
    """
    accepted = [position for position, point in enumerate(points) if point.is_non_inferior(margin)]
    if not accepted:
        least_harm = max(range(len(points)), key=lambda position: points[position].test_change.interval()[0])
        return ChosenPoint(position=least_harm, non_inferior=False)
    largest = max(points[position].region_accuracy for position in accepted)
    best = [position for position in accepted if points[position].region_accuracy_high >= largest]
    return ChosenPoint(position=min(best, key=lambda position: points[position].region_loss), non_inferior=True)


@dataclass(frozen=True, kw_only=True)
class CandidateChooser:
    """The store, the releases and the gate that the choice stage uses."""

    store: ArtifactStore
    releases: AnyReleases
    gate: Gate


def choose_candidate(chooser: CandidateChooser, work: work_pb2.ChooseWork, job: Job) -> work_pb2.Event:
    """Choose a candidate, serve it and measure it.

    A correction that is already stored is not computed again.
    """
    key = keys.correction(work.correction.name)
    if not chooser.store.exists(key):
        correction = correction_pb2.Correction()
        correction.CopyFrom(work.correction)
        correction.result.CopyFrom(_chosen(chooser, work.correction, job))
        correction.state = correction_pb2.Correction.STATE_SUCCEEDED
        chooser.store.write_message(key, correction)
    event = work_pb2.Event(subject=work.correction.name)
    event.corrected.result.CopyFrom(chooser.store.read_message(key, correction_pb2.Correction).result)
    return event


def _chosen(
    chooser: CandidateChooser, correction: correction_pb2.Correction, job: Job
) -> correction_pb2.CorrectionResult:
    points = [
        (position, number, point)
        for position, training in enumerate(correction.trainings)
        for number, point in enumerate(training.points)
    ]
    if not points:
        raise InvalidInput(
            f"no training came to an end; the first: {correction.trainings[0].error}", reason="ALL_FAILED"
        )
    chosen = choose([_measured(point) for _, _, point in points], correction.config.margin)
    position, number, point = points[chosen.position]
    job.progress(0.1, "serving the candidate and measuring it")
    job.check_cancelled()
    file = _keep(chooser.store, correction, position, number)
    correction_data = CorrectionData(chooser.store, correction)
    candidate = chooser.releases.serve_candidate(correction_data.model, file)
    base = chooser.releases.version(correction_data.model, correction.base_version)
    comparison = Comparison(base, candidate.classifier, correction_data.test)
    result = _result(comparison, correction_data)
    job.check_cancelled()
    verdict = chooser.gate.verdict_on(
        comparison, file, correction_data, lambda note: job.progress(0.5, f"checking the candidate: {note}")
    )
    result.verdict.CopyFrom(verdict)
    result.candidate, result.candidate_version = candidate.name, candidate.version
    result.parity.extend(point.parity)
    result.choice.CopyFrom(_choice(correction, chosen, position, point))
    return result


def _measured(point: correction_pb2.Point) -> MeasuredPoint:
    change = point.test_change
    return MeasuredPoint(
        region_accuracy=point.regions.value,
        region_accuracy_high=point.regions.high,
        region_loss=point.regions_loss,
        test_change=AccuracyDifference(gained=change.gained, lost=change.lost, trials=change.trials),
    )


def _choice(
    correction: correction_pb2.Correction, chosen: ChosenPoint, position: int, point: correction_pb2.Point
) -> correction_pb2.Choice:
    training = correction.trainings[position]
    return correction_pb2.Choice(
        rule=RULE.format(margin=correction.config.margin),
        method=training.method,
        region_weight=training.region_weight,
        learning_rate=training.learning_rate,
        share=point.share,
        non_inferior=chosen.non_inferior,
    )


def _keep(store: ArtifactStore, correction: correction_pb2.Correction, position: int, number: int) -> bytes:
    """Copy the chosen point's files to the candidate's keys.

    Returns the content of the ONNX file.
    """
    point = keys.point(correction.name, position, number)
    file = store.read_bytes(keys.onnx_file(point))
    store.write_bytes(keys.corrected_file(correction.name), file)
    if store.exists(weights := keys.weights_file(point)):
        store.write_bytes(keys.corrected_weights(correction.name), store.read_bytes(weights))
    return file


def _result(comparison: Comparison, correction_data: CorrectionData) -> correction_pb2.CorrectionResult:
    """Return both versions' results on images without part in the choice.

    These are the test split and the held-out region images.
    """
    readings = region_readings(comparison, correction_data)
    together = join_readings([read for _, read in readings])
    return correction_pb2.CorrectionResult(
        test_before=accuracy_estimate(comparison.test.before),
        test_after=accuracy_estimate(comparison.test.after),
        test_change=accuracy_change(comparison.test),
        regions=[_region(region, read, comparison, correction_data) for region, read in readings],
        regions_before=accuracy_estimate(together.before),
        regions_after=accuracy_estimate(together.after),
    )


def _region(
    region: HeldOutRegion, read: PairedReadings, comparison: Comparison, correction_data: CorrectionData
) -> correction_pb2.RegionChange:
    pictures = correction_data.pictures(region.region)
    return correction_pb2.RegionChange(
        region=region.region,
        label=region.label,
        before=accuracy_estimate(read.before),
        after=accuracy_estimate(read.after),
        exemplars_before=_answers(comparison.before, pictures),
        exemplars_after=_answers(comparison.after, pictures),
    )


def _answers(version: Version, pictures: Array) -> list[str]:
    """Return the class names that a version predicts for stored images."""
    return [version.model.classes[answer] for answer in version.classify_stored(pictures).argmax(axis=1)]
