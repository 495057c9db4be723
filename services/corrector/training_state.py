"""The state of a fine-tuning between two steps.

It has the weights, the moments of Adam and the best weights, and can be saved and restored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from services.arrays import Array
from services.corrector.distributed import ProcessGroup

# A small data set has few batches; weights move by steps.
MIN_EPOCHS, MIN_STEPS = 2, 300
# Share of the steps on which the rate rises: Adam's first steps are as large as its rate, whatever the gradient.
_WARMUP = 0.05
# Evaluations of the held-out loss in a training, and consecutive ones without a fall before it stops.
JUDGEMENTS, PATIENCE = 12, 4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The configuration of a training with Adam.

    The learning rate rises to `learning_rate` and then falls to zero along a cosine.
    """

    # 0 means at least `MIN_EPOCHS`, and enough for `MIN_STEPS`.
    epochs: int
    learning_rate: float
    region_weight: float
    seed: int
    batch_size: int = 128
    # 0 for a graph with a free batch size; otherwise every forward pass has exactly this many images.
    fixed_batch_size: int = 0
    # The graph returns probabilities; their logarithm enters the loss.
    probabilities: bool = False

    @property
    def unit(self) -> int:
        """Return the number of images that must stay together.

        It is the batch size of a graph with a fixed batch size, and 1 otherwise.
        """
        return self.fixed_batch_size or 1

    @property
    def whole_batch(self) -> int:
        """Return the batch size, rounded up to whole units."""
        return -(-self.batch_size // self.unit) * self.unit

    def epochs_over(self, count: int) -> int:
        """Return the number of passes over `count` images."""
        return self.epochs or max(MIN_EPOCHS, -(-MIN_STEPS * self.whole_batch // count))

    def rate_at(self, progress: float) -> float:
        """Return the learning rate at a share of all steps."""
        if progress < _WARMUP:
            return self.learning_rate * progress / _WARMUP
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))


class TrainingState:
    """The weights and the optimizer of a training.

    Only parameters that require a gradient are trained, evaluated and saved.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, count: int) -> None:
        self._network, self._schedule, self._count = network, schedule, count
        self.weights: dict[str, Tensor] = {
            name: weight for name, weight in network.named_parameters() if weight.requires_grad
        }
        self._optimizer = torch.optim.Adam(self.weights.values(), lr=schedule.learning_rate)
        self.steps = schedule.epochs_over(count) * -(-count // schedule.whole_batch)
        self.step, self._failed = 0, 0
        self._best: dict[str, Tensor] = {}
        self._best_step, self._best_loss = 0, math.inf

    def batches(self) -> Iterator[tuple[int, Array]]:
        """Yield each remaining step and its rows, until early stopping.

        Batches are full: the last batch of an epoch is filled up with rows of the same
        epoch.
        """
        generator, size = np.random.default_rng([self._schedule.seed, 0]), self._schedule.whole_batch
        step = 0
        while step < self.steps:
            order = generator.permutation(self._count)
            for rows in np.resize(order, -(-self._count // size) * size).reshape(-1, size):
                step += 1
                if step > self.step:
                    yield step, rows
                if self._failed >= PATIENCE:
                    return

    def descend(self, loss: Tensor, processes: ProcessGroup) -> float:
        """Make a gradient step, and return the loss, summed over the processes."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate_at((self.step + 0.5) / self.steps)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total = processes.sum_gradients(self.weights.values(), loss.detach())
        self._optimizer.step()
        self.step += 1
        return total

    def is_evaluation_due(self) -> bool:
        """Return whether the held-out loss is to be evaluated after this step.

        It is evaluated several times in a training, and at its end.
        """
        return self.step % max(1, self.steps // JUDGEMENTS) == 0 or self.step == self.steps

    def judge(self, held_out_loss: float) -> None:
        """Keep the weights when their held-out loss is the lowest so far."""
        if held_out_loss < self._best_loss:
            self._best = {name: weight.detach().clone() for name, weight in self.weights.items()}
            self._best_step, self._best_loss, self._failed = self.step, held_out_loss, 0
        else:
            self._failed += 1

    def take_best(self) -> int:
        """Set the network to the best weights and return their step.

        Without an evaluation, the present weights stay.
        """
        if self._best:
            self._network.load_state_dict(self._best, strict=False)
        return self._best_step or self.step

    def to_bytes(self) -> bytes:
        """Return a checkpoint as a safetensors file."""
        moments = self._optimizer.state_dict()["state"]
        tensors = {f"now.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self._best.items()}
        tensors |= {f"adam.{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
        tensors["counts"] = torch.tensor([self.step, self._failed, self._best_step])
        tensors["best_loss"] = torch.tensor(self._best_loss, dtype=torch.float64)
        return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})

    def restore(self, checkpoint: bytes, *, judges: bool) -> None:
        """Resume from a checkpoint of `to_bytes`.

        Only the process that `judges` counts failed evaluations.
        """
        tensors = safetensors.torch.load(checkpoint)
        self.step, self._failed, self._best_step = tensors["counts"].tolist()
        self._failed *= judges
        self._best_loss = tensors["best_loss"].item()
        self._network.load_state_dict(_below("now.", tensors), strict=False)
        best = _below("best.", tensors)
        self._best = {name: value.to(self.weights[name].device) for name, value in best.items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("adam.", tensors).items():
            index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
