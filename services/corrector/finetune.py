"""Fine-tuning of deployed weights on original and region images.

The loss is (1 - lambda) CE(original) + lambda CE(regions), on augmented images.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.arrays import Array
from services.corrector.distributed import SINGLE_PROCESS, ProcessGroup
from services.corrector.training_state import Schedule, TrainingState

# Uniform numbers for each image: shift right, shift down, rotation, flip.
DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The allowed changes of a training image.

    Pixels that enter from outside repeat the border.
    """

    # Share of the image's side, in both directions.
    max_shift: float = 0.0
    # In both directions.
    max_rotation_degrees: float = 0.0
    # Of half of the images.
    horizontal_flip: bool = False

    def __call__(self, images: Array, draws: Array) -> Array:
        """Return images (n, c, h, w), changed by uniform draws (n, 4)."""
        if not (self.max_shift or self.max_rotation_degrees or self.horizontal_flip):
            return images
        x = torch.from_numpy(np.asarray(images, np.float32))
        grid = F.affine_grid(torch.from_numpy(self._maps(draws, *images.shape[2:])), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False).numpy()

    def _maps(self, draws: Array, height: int, width: int) -> Array:
        """Return affine maps (n, 2, 3) from the new image to the old one.

        Coordinates are in [-1, 1] from border to border.
        """
        either_way = 2 * draws - 1
        angle = np.deg2rad(self.max_rotation_degrees) * either_way[:, 2]
        mirror = np.where(self.horizontal_flip & (draws[:, 3] < 0.5), -1.0, 1.0)
        aspect = height / width
        maps = np.empty((len(draws), 2, 3), np.float32)
        maps[:, 0, 0], maps[:, 0, 1] = mirror * np.cos(angle), -np.sin(angle) * aspect
        maps[:, 1, 0], maps[:, 1, 1] = mirror * np.sin(angle) / aspect, np.cos(angle)
        maps[:, :, 2] = -2 * self.max_shift * either_way[:, :2]
        return maps


_EVALUATED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class LabelledDataset:
    """A data set that is read in batches.

    `fetch` maps positions to images (n, c, h, w) in [0, 1].
    """

    fetch: Callable[[Array], Array]
    # (m,) class ids
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class TrainingMix:
    """Original data and region data.

    With lambda 0, the regions are not read.
    """

    original: LabelledDataset
    regions: LabelledDataset

    def weighted(self, region_weight: float) -> list[tuple[LabelledDataset, float]]:
        """Return the data sets of the loss, and their weights.

        A data set of weight 0 is left out.
        """
        parts = [(self.original, 1 - region_weight), (self.regions, region_weight)]
        return [(data, weight) for data, weight in parts if weight]


@dataclass(frozen=True, kw_only=True)
class InputMap:
    """The map from images (n, c, h, w) in [0, 1] to the network's inputs."""

    prepare: Callable[[Array], Array]
    # In training only, before `prepare`: images, with uniform draws (n, `DRAWS`).
    augment: Callable[[Array, Array], Array] = lambda images, _draws: images


@dataclass(frozen=True, kw_only=True)
class FinetuneOutcome:
    """The number of steps of a training, and its best step.

    The best step has the lowest held-out loss.
    """

    steps: int
    best_step: int


class Diverged(ArithmeticError):
    """Raised when the loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """The network, data and schedule of a training."""

    network: nn.Module
    data: TrainingMix
    # Held-out data for early stopping.
    held_out: TrainingMix
    inputs: InputMap
    schedule: Schedule


def finetune(
    finetune_job: FinetuneJob,
    *,
    device: torch.device,
    on_step: Callable[[int, int, float], None] = lambda _step, _steps, _loss: None,
    checkpoint: bytes | None = None,
    on_checkpoint: Callable[[bytes], None] = lambda _checkpoint: None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> FinetuneOutcome:
    """Train the network in place, up to the lowest held-out loss.

    It ends with the weights of that loss. Training stops early once the loss has not fallen several times in a row.
    Without held-out data it runs to the end. Every draw comes from the schedule's seed: equal seeds give equal weights
    on one machine with the same number of threads. `on_step(step, steps, loss)` is called after every step and may
    raise to stop. `on_checkpoint` gets a checkpoint whenever the held-out loss was evaluated; the last one, as
    `checkpoint`, continues to the same weights.

    Several `processes` share every batch, with the result of one process up to rounding. The first process alone
    evaluates, and may end the training of the others, which raises TrainingAbandoned there. Raises Diverged when the
    loss is not finite.
    """
    network, weight = finetune_job.network.to(device), finetune_job.schedule.region_weight
    state = TrainingState(network, finetune_job.schedule, len(finetune_job.data.original))
    if checkpoint:
        state.restore(checkpoint, judges=processes.rank == 0)
    judged = processes.rank == 0 and all(len(part) for part, _ in finetune_job.held_out.weighted(weight))
    together = False
    try:
        for step, rows in state.batches():
            total = state.descend(_loss_of_batch(finetune_job, step, rows, device, processes), processes)
            if together := not math.isfinite(total):  # equal in all processes
                raise Diverged(f"the loss is {total} at step {step} of {state.steps}")
            on_step(step, state.steps, total)
            if judged and state.is_evaluation_due():
                state.judge(held_out_loss(finetune_job, device))
                on_checkpoint(state.to_bytes())
    finally:
        if processes.rank == 0 and state.step < state.steps and not together:
            processes.abandon(state.weights.values())
    best_step = state.take_best()
    network.eval()
    return FinetuneOutcome(steps=state.step, best_step=best_step)


def held_out_loss(finetune_job: FinetuneJob, device: torch.device) -> float:
    """Return the mixed loss on the held-out data."""
    total, prepare = 0.0, finetune_job.inputs.prepare
    with torch.inference_mode():
        for part, weight in finetune_job.held_out.weighted(finetune_job.schedule.region_weight):
            losses = [
                _cross_entropies(finetune_job, prepare(part.fetch(rows)), part.labels[rows], device).cpu()
                for rows in _slices(len(part))
            ]
            total += weight * float(torch.cat(losses).mean())
    return total


def _slices(count: int) -> Iterator[Array]:
    for begin in range(0, count, _EVALUATED_AT_ONCE):
        yield np.arange(begin, min(begin + _EVALUATED_AT_ONCE, count))


def _loss_of_batch(
    finetune_job: FinetuneJob, step: int, rows: Array, device: torch.device, processes: ProcessGroup
) -> Tensor:
    """Return this process's part of the mixed loss of a batch.

    The parts of all processes add up to the loss. Original and region images share one pass through the network, which
    is faster than two.
    """
    inputs, schedule = finetune_job.inputs, finetune_job.schedule
    mine = _part_of(len(rows), schedule.unit, processes)
    if not len(mine):  # more processes than units: this one contributes zero gradients
        return torch.stack([weight.sum() for weight in finetune_job.network.parameters()]).sum() * 0
    images, labels, weights = [], [], []
    for kind, (part, weight) in enumerate(finetune_job.data.weighted(schedule.region_weight)):
        generator = np.random.default_rng([schedule.seed, 1, step, kind])
        # Original data go epoch by epoch; regions are drawn with replacement, as they have far fewer images.
        chosen = rows if part is finetune_job.data.original else generator.integers(len(part), size=len(rows))
        draws = generator.random((len(rows), DRAWS))
        images.append(inputs.prepare(inputs.augment(part.fetch(chosen[mine]), draws[mine])))
        labels.append(part.labels[chosen[mine]])
        weights.append(np.full(len(mine), weight / len(rows), np.float32))
    losses = _cross_entropies(finetune_job, np.concatenate(images), np.concatenate(labels), device)
    return losses @ torch.from_numpy(np.concatenate(weights)).to(device)


def _part_of(count: int, unit: int, processes: ProcessGroup) -> Array:
    """Return this process's positions of a batch, in whole units."""
    return np.arange(count).reshape(-1, unit)[processes.rank :: processes.size].reshape(-1)


def _cross_entropies(finetune_job: FinetuneJob, images: Array, labels: Array, device: torch.device) -> Tensor:
    """Return the cross entropy of each input, (n,)."""
    schedule = finetune_job.schedule
    filled = np.resize(np.arange(len(images)), -(-len(images) // schedule.unit) * schedule.unit)
    x = torch.from_numpy(images[filled]).to(device)
    outputs = torch.cat(
        [finetune_job.network(part) for part in torch.split(x, schedule.fixed_batch_size or len(x))]
    )  # (n, k)
    if schedule.probabilities:
        outputs = outputs.clamp_min(1e-12).log()
    return F.cross_entropy(outputs[: len(images)], torch.from_numpy(labels).to(device), reduction="none")
