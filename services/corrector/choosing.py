"""The corrector's second stage: the point that the rule chooses is served as the candidate and measured as callers
will meet it.
"""

from dataclasses import dataclass

import numpy as np
from defuse.v1 import correction_pb2, tensor_pb2, work_pb2

from services.corrector.augmentation import Array
from services.corrector.choice import RULE, Chosen, Measured, choose
from services.corrector.materials import HeldOut, Materials
from services.corrector.measuring import difference_between, share_of
from services.corrector.paired import PairedDifference
from services.corrector.release import Releases
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.inference import Classifier, InferenceClient
from services.runtime.intervals import estimate
from services.runtime.worker import Job


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """What the stage reads from, asks, and serves candidates with."""

    store: ArtifactStore
    inference: InferenceClient
    releases: Releases


def choose_candidate(chooser: Chooser, work: work_pb2.ChooseWork, job: Job) -> work_pb2.Event:
    """Choose, serve and measure; a correction that is stored already is not made again."""
    key = catalog.correction(work.correction.name)
    if not chooser.store.exists(key):
        correction = correction_pb2.Correction()
        correction.CopyFrom(work.correction)
        correction.result.CopyFrom(_chosen(chooser, work.correction, job))
        correction.state = correction_pb2.Correction.STATE_SUCCEEDED
        chooser.store.write_message(key, correction)
    event = work_pb2.Event(subject=work.correction.name)
    event.corrected.result.CopyFrom(chooser.store.read_message(key, correction_pb2.Correction).result)
    return event


def _chosen(chooser: Chooser, correction: correction_pb2.Correction, job: Job) -> correction_pb2.CorrectionResult:
    points = [
        (position, number, point)
        for position, training in enumerate(correction.trainings)
        for number, point in enumerate(training.points)
    ]
    chosen = choose([_measured(point) for _, _, point in points], correction.config.margin)
    position, number, point = points[chosen.position]
    job.progress(0.1, "serving the candidate and measuring it")
    file = _keep(chooser.store, correction, position, number)
    materials = Materials(chooser.store, correction)
    candidate, version = chooser.releases.serve_candidate(materials.model, file)
    result = _measure(
        materials,
        before=chooser.inference.classifier(materials.model, version=correction.base_version),
        after=chooser.inference.classifier(materials.model, version=version, model_id=candidate),
    )
    result.candidate, result.candidate_version = candidate, version
    result.parity.extend(point.parity)
    result.choice.CopyFrom(_choice(correction, chosen, position, point))
    return result


def _measured(point: correction_pb2.Point) -> Measured:
    change = point.test_change
    return Measured(
        region_accuracy=point.regions.value,
        region_accuracy_high=point.regions.high,
        region_loss=point.regions_loss,
        test_change=PairedDifference(gained=change.gained, lost=change.lost, trials=change.trials),
    )


def _choice(
    correction: correction_pb2.Correction, chosen: Chosen, position: int, point: correction_pb2.Point
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
    """Give the files of the chosen point the names that a release looks for; return the ONNX file."""
    point = catalog.point(correction.name, position, number)
    file = store.read_bytes(catalog.onnx_of(point))
    store.write_bytes(catalog.corrected_file(correction.name), file)
    if store.exists(weights := catalog.weights_of(point)):
        store.write_bytes(catalog.corrected_weights(correction.name), store.read_bytes(weights))
    return file


def _measure(materials: Materials, *, before: Classifier, after: Classifier) -> correction_pb2.CorrectionResult:
    """Measure both versions through Triton: on the test split, and on the held-out images that decided on nothing."""
    test = materials.test
    right_before, right_after = (
        _read(version.classify_stored(test.images), test.labels) for version in (before, after)
    )
    result = correction_pb2.CorrectionResult(
        test_before=share_of(right_before),
        test_after=share_of(right_after),
        test_change=difference_between(right_before, right_after),
    )
    for region in materials.held_out_regions(deciding=False):
        images, pictures = materials.decoded(region.latent), materials.pictures(region.region)
        result.regions.add(
            region=region.region,
            label=region.label,
            before=_region_accuracy(before, region, images),
            after=_region_accuracy(after, region, images),
            exemplars_before=_answers(before, pictures),
            exemplars_after=_answers(after, pictures),
        )
    result.regions_before.CopyFrom(_total([region.before for region in result.regions]))
    result.regions_after.CopyFrom(_total([region.after for region in result.regions]))
    return result


def _read(logits: Array, labels: Array) -> Array:
    return np.asarray(logits.argmax(axis=1) == labels)


def _region_accuracy(version: Classifier, region: HeldOut, images: Array) -> tensor_pb2.Estimate:
    return share_of(_read(version.classify(images), np.full(len(images), region.label_id)))


def _answers(version: Classifier, pictures: Array) -> list[str]:
    """Return the class names that a version answers for stored images."""
    return [version.model.classes[answer] for answer in version.classify_stored(pictures).argmax(axis=1)]


def _total(parts: list[tensor_pb2.Estimate]) -> tensor_pb2.Estimate:
    return estimate(sum(part.successes for part in parts), sum(part.trials for part in parts))
