"""The corrector's stage: data, fine-tuning, export, candidate, figures."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from defuse import names
from defuse.errors import InvalidInput
from defuse.v1 import correction_pb2, model_pb2, tensor_pb2, work_pb2

from services.corrector.curriculum import Array, RegionData, RegionImages, region_images
from services.corrector.export import BatchParity, export
from services.corrector.finetune import Labelled, Schedule, finetune
from services.corrector.onnx_module import OnnxModule, UnsupportedOperator
from services.corrector.release import Releases
from services.runtime import catalog
from services.runtime.artifacts import ArtifactStore
from services.runtime.autoencoder import read_decoder
from services.runtime.catalog import Catalog, LabelledImages
from services.runtime.inference import Classifier, InferenceClient, as_floats, preprocess
from services.runtime.intervals import estimate
from services.runtime.worker import Job

IMAGES_PER_REGION = 256
# Of the progress of a correction.
_TRAINING_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the stage reads from and asks."""

    store: ArtifactStore
    inference: InferenceClient
    releases: Releases
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out images of one labelled region."""

    region: str
    label: str
    label_id: int
    # (n, c, h, w) in [0, 1]
    images: Array


def correct(tools: Tools, work: work_pb2.CorrectWork, job: Job) -> work_pb2.Event:
    """Correct a model; a correction that is stored already is not made again."""
    key = catalog.correction(work.correction.name)
    if not tools.store.exists(key):
        correction = correction_pb2.Correction()
        correction.CopyFrom(work.correction)
        correction.result.CopyFrom(_correct(tools, work, job))
        correction.state = correction_pb2.Correction.STATE_SUCCEEDED
        tools.store.write_message(key, correction)
    event = work_pb2.Event(subject=work.correction.name)
    event.corrected.result.CopyFrom(tools.store.read_message(key, correction_pb2.Correction).result)
    return event


def _correct(tools: Tools, work: work_pb2.CorrectWork, job: Job) -> correction_pb2.CorrectionResult:
    reader = Catalog(tools.store)
    model = reader.model(work.run.config.model)
    job.progress(0.01, "drawing images from the regions")
    decode = read_decoder(tools.store, work.run.config)
    train = reader.split(work.run.config.dataset, "train", model)
    regions = _training_images(tools, work, model, decode)
    network = _deployed(tools.store, model, work.correction.base_version)
    _train(network, model, train, regions, work.correction.config, tools.device, job)
    job.progress(_TRAINING_SHARE, "exporting and comparing with torch")
    largest = model.fixed_batch_size or model.max_batch_size
    inputs = preprocess(as_floats(np.resize(train.images, (largest, *train.images.shape[1:]))), model)
    file, parity = export(network, inputs, sorted({largest} if model.fixed_batch_size else {1, 2, largest}))
    tools.store.write_bytes(catalog.corrected_file(work.correction.name), file)
    job.progress(0.85, "serving the candidate and measuring it")
    candidate, version = tools.releases.serve_candidate(model, file)
    before = tools.inference.classifier(model, version=work.correction.base_version)
    after = tools.inference.classifier(model, version=version, model_id=candidate)
    test = reader.split(work.run.config.dataset, "test", model)
    held_out = [_held_out(tools, region, model, decode) for region in work.regions]
    result = _measure(before, after, test, held_out)
    result.parity.extend(_parity(entry) for entry in parity)
    result.candidate, result.candidate_version = candidate, version
    return result


def _training_images(
    tools: Tools, work: work_pb2.CorrectWork, model: model_pb2.Model, decode: Callable[[Array], Array]
) -> RegionImages:
    data = [
        RegionData(
            latent=tools.store.read_arrays(catalog.region_arrays(region.region))["latent"],
            label=list(model.classes).index(region.label),
        )
        for region in work.regions
    ]
    return region_images(data, per_region=IMAGES_PER_REGION, decode=decode, seed=work.correction.config.seed)


def _deployed(store: ArtifactStore, model: model_pb2.Model, version: int) -> OnnxModule:
    file = store.read_bytes(catalog.model_file(model.name, version))
    try:
        return OnnxModule(onnx.load_model_from_string(file))
    except UnsupportedOperator as error:
        raise InvalidInput(
            f"version {version} of {names.last(model.name)!r} cannot be corrected: {error}",
            reason="UNSUPPORTED_OPERATOR",
        ) from error


def _train(
    network: OnnxModule,
    model: model_pb2.Model,
    train: LabelledImages,
    regions: RegionImages,
    config: correction_pb2.CorrectionConfig,
    device: torch.device,
    job: Job,
) -> None:
    schedule = Schedule(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        region_weight=config.region_weight,
        seed=config.seed,
        fixed_batch_size=model.fixed_batch_size,
        probabilities=model.output == model_pb2.Model.OUTPUT_PROBABILITIES,
    )
    original = Labelled(fetch=lambda rows: preprocess(as_floats(train.images[rows]), model), labels=train.labels)
    added = Labelled(fetch=lambda rows: preprocess(regions.images[rows], model), labels=regions.labels)

    def on_step(step: int, steps: int, loss: float) -> None:
        job.check_cancelled()
        if step % 10 == 0 or step == steps:
            job.progress(_TRAINING_SHARE * step / steps, f"training, step {step} of {steps}, loss {loss:.4f}")

    finetune(network, original, added, schedule, device=device, on_step=on_step)


def _held_out(
    tools: Tools, region: correction_pb2.LabelledRegion, model: model_pb2.Model, decode: Callable[[Array], Array]
) -> HeldOut:
    latent = tools.store.read_arrays(catalog.region_arrays(region.region))["held_out_latent"]
    height, width, channels = model.image_shape
    images = decode(latent) if len(latent) else np.zeros((0, channels, height, width), np.float32)
    label_id = list(model.classes).index(region.label)
    return HeldOut(region=region.region, label=region.label, label_id=label_id, images=images)


def _measure(
    before: Classifier, after: Classifier, test: LabelledImages, held_out: list[HeldOut]
) -> correction_pb2.CorrectionResult:
    """Measure both versions through Triton, on the test split and on the held-out images of every region."""
    result = correction_pb2.CorrectionResult(
        test_before=_accuracy(before.classify_stored(test.images), test.labels),
        test_after=_accuracy(after.classify_stored(test.images), test.labels),
    )
    for entry in held_out:
        result.regions.add(
            region=entry.region,
            label=entry.label,
            before=_region_accuracy(before, entry),
            after=_region_accuracy(after, entry),
        )
    result.regions_before.CopyFrom(_total([region.before for region in result.regions]))
    result.regions_after.CopyFrom(_total([region.after for region in result.regions]))
    return result


def _accuracy(logits: Array, labels: Array) -> tensor_pb2.Estimate:
    return estimate(int((logits.argmax(axis=1) == labels).sum()), len(labels))


def _region_accuracy(classifier: Classifier, entry: HeldOut) -> tensor_pb2.Estimate:
    if not len(entry.images):
        return estimate(0, 0)
    return _accuracy(classifier.classify(entry.images), np.full(len(entry.images), entry.label_id))


def _total(parts: list[tensor_pb2.Estimate]) -> tensor_pb2.Estimate:
    return estimate(sum(part.successes for part in parts), sum(part.trials for part in parts))


def _parity(entry: BatchParity) -> correction_pb2.Parity:
    return correction_pb2.Parity(batch_size=entry.batch_size, max_abs_difference=entry.max_abs_difference)
