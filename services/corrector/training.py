"""The training stage of a correction.

A training reads its inputs, fine-tunes the network, and measures the resulting points.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from defuse.errors import Internal, InvalidInput
from defuse.v1 import correction_pb2, work_pb2
from defuse.v1.correction_pb2 import Training
from torch import Tensor

from services.arrays import as_floats
from services.corrector.correction_data import CorrectionData, RegionData, sample_regions
from services.corrector.distributed import SINGLE_PROCESS, ProcessGroup, TrainingAbandoned
from services.corrector.evaluation import Evaluator, region_images
from services.corrector.finetune import (
    Augmentation,
    Diverged,
    FinetuneJob,
    FinetuneOutcome,
    InputMap,
    LabelledDataset,
    TrainingMix,
    finetune,
)
from services.corrector.networks import Network, TorchModule, deployed_network, real_inputs
from services.corrector.training_state import Schedule
from services.onnx_graph.onnx_files import ParityError, export
from services.runtime.worker import Job
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import LabelledImages
from services.triton.preprocessing import preprocess

# Bytes of region images that are kept rendered; further ones are rendered again for every batch.
_FLOAT_BYTES, _KEPT_BYTES = 4, 1 << 30


def read_finetune_job(
    correction_data: CorrectionData, wanted: Training, allowed_factories: Sequence[str]
) -> tuple[Network, FinetuneJob]:
    """Return the deployed network, and the job that trains it."""
    network = deployed_network(correction_data, allowed_factories)
    if wanted.method == Training.METHOD_LAST_LAYER:
        _train_last_layer_only(network)
    finetune_job = FinetuneJob(
        network=network,
        data=_data(correction_data, wanted),
        held_out=_held_out(correction_data),
        inputs=_inputs(correction_data),
        schedule=_schedule(correction_data, wanted),
    )
    return network, finetune_job


def _train_last_layer_only(network: Network) -> None:
    if not network.last_layer:
        raise InvalidInput(
            "the network has no last layer, a product of weights with features that leads straight to the output; "
            "leave out the method last_layer",
            reason="NO_LAST_LAYER",
        )
    for name, weight in network.named_parameters():
        weight.requires_grad_(name in network.last_layer)


def _data(correction_data: CorrectionData, wanted: Training) -> TrainingMix:
    """Return the training data.

    They are original data, and images of regions or of single failures.
    """
    config = correction_data.correction.config
    regions = correction_data.regions()
    total = config.images_per_region * len(regions)
    if wanted.method == Training.METHOD_UNCLUSTERED:
        regions = correction_data.single_failures(config.unclustered_failures or len(regions))
    if not wanted.region_weight:
        regions = []
    return TrainingMix(original=_stored(correction_data.train), regions=_drawn(correction_data, regions, total))


def _drawn(correction_data: CorrectionData, regions: Sequence[RegionData], total: int) -> LabelledDataset:
    if not regions:
        return LabelledDataset(fetch=lambda rows: rows, labels=np.zeros(0, np.int64))
    drawn, labels = sample_regions(
        correction_data.images,
        regions,
        per_region=max(1, total // len(regions)),
        seed=correction_data.correction.config.seed,
    )
    if len(drawn) * np.prod(correction_data.model.image_shape) * _FLOAT_BYTES > _KEPT_BYTES:
        return LabelledDataset(fetch=lambda rows: correction_data.rendered(drawn.take(rows)), labels=labels)
    images = correction_data.rendered(drawn)
    return LabelledDataset(fetch=lambda rows: images[rows], labels=labels)


def _held_out(correction_data: CorrectionData) -> TrainingMix:
    images, labels = region_images(correction_data, correction_data.held_out_regions(deciding=True))
    regions = LabelledDataset(fetch=lambda rows: images[rows], labels=labels)
    return TrainingMix(original=_stored(correction_data.held_out_original()), regions=regions)


def _stored(data: LabelledImages) -> LabelledDataset:
    return LabelledDataset(fetch=lambda rows: as_floats(data.images[rows]), labels=data.labels)


def _inputs(correction_data: CorrectionData) -> InputMap:
    declared = correction_data.correction.config.augmentation
    augmentation = Augmentation(
        max_shift=declared.max_shift,
        max_rotation_degrees=declared.max_rotation_degrees,
        horizontal_flip=declared.horizontal_flip,
    )
    return InputMap(prepare=lambda images: preprocess(images, correction_data.model), augment=augmentation)


def _schedule(correction_data: CorrectionData, wanted: Training) -> Schedule:
    config, model = correction_data.correction.config, correction_data.model
    return Schedule(
        epochs=config.epochs,
        learning_rate=wanted.learning_rate,
        region_weight=wanted.region_weight,
        seed=config.seed,
        fixed_batch_size=model.fixed_batch_size,
        probabilities=model.output == model.OUTPUT_PROBABILITIES,
    )


# Shares of the path from the weights before to those after that an interpolation measures.
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Share of the steps in the progress of a training; measuring has the rest.
_STEPS_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The store, device and processes that the training stage uses."""

    store: ArtifactStore
    device: torch.device
    # `module:function` entries that may be named as torch factories.
    factories: Sequence[str] = ()
    processes: ProcessGroup = SINGLE_PROCESS


@dataclass(frozen=True, kw_only=True)
class AnnouncedTraining:
    """The training that the first of several processes announces to the others."""

    # TrainWork, serialized.
    work: bytes
    checkpoint: bytes | None


def train(trainer: Trainer, work: work_pb2.TrainWork, job: Job) -> work_pb2.Event:
    """Run one training of a correction.

    A training that is already stored is not run again.
    """
    name, store = work.correction.name, trainer.store
    key = keys.training(name, work.training)
    if not store.exists(key):
        store.write_message(key, _trained(trainer, work, job))
    store.remove(keys.checkpoint(name, work.training))
    event = work_pb2.Event(subject=name)
    event.trained.position = work.training
    event.trained.training.CopyFrom(store.read_message(key, Training))
    return event


def follow_announced(trainer: Trainer, announced: AnnouncedTraining) -> None:
    """Run this process's part of a training that the first process announced."""
    work = work_pb2.TrainWork.FromString(announced.work)
    correction_data = CorrectionData(trainer.store, work.correction)
    _, finetune_job = read_finetune_job(correction_data, work.correction.trainings[work.training], trainer.factories)
    with suppress(TrainingAbandoned, Diverged):
        finetune(finetune_job, device=trainer.device, checkpoint=announced.checkpoint, processes=trainer.processes)


def _trained(trainer: Trainer, work: work_pb2.TrainWork, job: Job) -> Training:
    """Run a training, and return its points or its error.

    A failure does not end the correction: its other trainings continue.
    """
    wanted = work.correction.trainings[work.training]
    try:
        return _train(trainer, work, job)
    except Diverged as error:
        why = f"it diverged: {error}; the learning rate {wanted.learning_rate:g} is too large"
    except (InvalidInput, Internal) as error:
        why = error.message
    failed = Training(error=why)
    failed.MergeFrom(wanted)
    return failed


def _train(trainer: Trainer, work: work_pb2.TrainWork, job: Job) -> Training:
    wanted = work.correction.trainings[work.training]
    correction_data = CorrectionData(trainer.store, work.correction)
    _say(job, work, 0.0, "drawing images")
    network, finetune_job = read_finetune_job(correction_data, wanted, trainer.factories)
    before = _weights_of(network)
    outcome = _finetuned(trainer, finetune_job, work, job)
    done = Training(
        method=wanted.method,
        region_weight=wanted.region_weight,
        learning_rate=wanted.learning_rate,
        steps=outcome.steps,
        best_step=outcome.best_step,
    )
    after, evaluator = _weights_of(network.cpu()), Evaluator(correction_data)
    shares = SHARES if wanted.method == Training.METHOD_INTERPOLATION else (1.0,)
    for number, share in enumerate(shares):
        job.check_cancelled()
        _say(job, work, _STEPS_SHARE, "exporting and measuring")
        _interpolate(network, before, after, share)
        point = _point(correction_data, network, evaluator, keys.point(work.correction.name, work.training, number))
        point.share = share
        done.points.append(point)
    return done


def _finetuned(trainer: Trainer, finetune_job: FinetuneJob, work: work_pb2.TrainWork, job: Job) -> FinetuneOutcome:
    """Run the fine-tuning with all processes, from the last checkpoint if any.

    A worker that died leaves a checkpoint.
    """
    key = keys.checkpoint(work.correction.name, work.training)
    checkpoint = trainer.store.read_bytes(key) if trainer.store.exists(key) else None

    def on_step(step: int, steps: int, loss: float) -> None:
        job.check_cancelled()
        if step % 10 == 0 or step == steps:
            _say(job, work, _STEPS_SHARE * step / steps, f"step {step} of {steps}, loss {loss:.4f}")

    trainer.processes.announce(AnnouncedTraining(work=work.SerializeToString(), checkpoint=checkpoint))
    return finetune(
        finetune_job,
        device=trainer.device,
        on_step=on_step,
        checkpoint=checkpoint,
        on_checkpoint=lambda file: trainer.store.write_bytes(key, file),
        processes=trainer.processes,
    )


def _weights_of(network: Network) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def _interpolate(network: Network, before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> None:
    """Set the network to weights between before (0) and after (1)."""
    line = {name: torch.lerp(before[name], after[name], share) for name in after}
    network.load_state_dict(line, strict=False)


def _point(
    correction_data: CorrectionData, network: Network, evaluator: Evaluator, prefix: str
) -> correction_pb2.Point:
    """Export the network, store its file and evaluate it."""
    model = correction_data.model
    largest = model.fixed_batch_size or model.max_batch_size
    sizes = sorted({largest} if model.fixed_batch_size else {1, 2, largest})
    try:
        file, parity = export(network, real_inputs(correction_data, largest), sizes)
    except ParityError as error:
        raise Internal(f"{error}; nothing was served", reason="PARITY") from error
    correction_data.store.write_bytes(keys.onnx_file(prefix), file)
    if isinstance(network, TorchModule):
        correction_data.store.write_bytes(keys.weights_file(prefix), network.weights())
    point = evaluator.measure(file)
    for entry in parity:
        point.parity.add(batch_size=entry.batch_size, max_abs_difference=entry.max_abs_difference)
    return point


def _say(job: Job, work: work_pb2.TrainWork, fraction: float, note: str) -> None:
    training = work.correction.trainings[work.training]
    method = Training.Method.Name(training.method).removeprefix("METHOD_").lower().replace("_", " ")
    settings = f"lambda {training.region_weight:g}, learning rate {training.learning_rate:g}"
    job.progress(fraction, f"{method}, {settings}: {note}", training=work.training)
