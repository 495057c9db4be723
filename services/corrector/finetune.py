"""Fine-tuning of deployed weights: loss = (1 - lambda) CE(original) + lambda CE(regions)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

Array = npt.NDArray[Any]
# A small data set has few batches; weights move by steps.
MIN_EPOCHS, MIN_STEPS = 2, 300
# Rows of a data set, by position, as the classifier's input.
Fetch = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast. Adam with a cosine from `learning_rate` to zero."""

    # 0 takes at least `MIN_EPOCHS`, and as many as give `MIN_STEPS`.
    epochs: int
    learning_rate: float
    region_weight: float
    seed: int
    batch_size: int = 128
    # 0 for a graph that takes any batch; otherwise every forward pass has exactly this many images.
    fixed_batch_size: int = 0
    # The graph answers probabilities; their logarithm enters the loss.
    probabilities: bool = False


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A data set that is read in batches."""

    fetch: Fetch
    labels: Array

    def batch(self, rows: Array, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.fetch(rows)).to(device), torch.from_numpy(self.labels[rows]).to(device)


def finetune(
    network: nn.Module,
    original: Labelled,
    regions: Labelled,
    schedule: Schedule,
    *,
    device: torch.device,
    on_step: Callable[[int, int, float], None],
) -> nn.Module:
    """Train the network in place and return it.

    `on_step(step, steps, loss)` is called after every step and may raise to stop the training.
    """
    network.to(device)
    size = _batch_size(schedule)
    batches = list(_batches(len(original.labels), size, schedule))
    generator = np.random.default_rng([schedule.seed, 1])
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=schedule.learning_rate)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
    for step, rows in enumerate(batches, start=1):
        drawn = generator.integers(len(regions.labels), size=size)
        loss = mixed_loss(
            _cross_entropy(network, *original.batch(rows, device), schedule),
            _cross_entropy(network, *regions.batch(drawn, device), schedule),
            schedule.region_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        annealing.step()
        on_step(step, len(batches), float(loss.detach()))
    return network.eval()


def mixed_loss(original: torch.Tensor, regions: torch.Tensor, region_weight: float) -> torch.Tensor:
    """Return `(1 - lambda) CE(original) + lambda CE(regions)`."""
    return (1 - region_weight) * original + region_weight * regions


def _batch_size(schedule: Schedule) -> int:
    """Return the batch size, rounded up to a multiple of the graph's own."""
    unit = schedule.fixed_batch_size or 1
    return -(-schedule.batch_size // unit) * unit


def _batches(count: int, size: int, schedule: Schedule) -> Iterator[Array]:
    """Yield full batches of row positions; the last of an epoch is filled up with rows of the same epoch."""
    generator = np.random.default_rng([schedule.seed, 0])
    epochs = schedule.epochs or max(MIN_EPOCHS, -(-MIN_STEPS * size // count))
    for _ in range(epochs):
        order = generator.permutation(count)
        filled = np.resize(order, -(-count // size) * size)
        yield from filled.reshape(-1, size)


def _cross_entropy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    parts = torch.split(images, schedule.fixed_batch_size or len(images))
    outputs = torch.cat([network(part) for part in parts])  # (n, k)
    if schedule.probabilities:
        outputs = outputs.clamp_min(1e-12).log()
    return F.cross_entropy(outputs, labels)
