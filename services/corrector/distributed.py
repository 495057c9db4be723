"""Training in several processes, with one device each.

The processes share each batch and sum their gradients.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Followers wait for work without a limit.
_PATIENCE = timedelta(days=3650)


class TrainingAbandoned(Exception):
    """Raised when the first process has ended the training.

    The training was cancelled, or the held-out loss stopped falling.
    """


class ProcessGroup(Protocol):
    """The processes that share a training.

    The first one, of rank 0, decides when it ends.
    """

    rank: int
    size: int

    def announce(self, work: Any) -> None:
        """Send the next training from the first process to the others.

        None ends the other processes.
        """
        ...

    def sum_gradients(self, weights: Collection[Tensor], loss: Tensor) -> float:
        """Replace the gradients by their sums over all processes.

        Returns the sum of the losses. Raises TrainingAbandoned when the first process has ended the training.
        """
        ...

    def abandon(self, weights: Collection[Tensor]) -> None:
        """End the training of the other processes at their next step."""
        ...


class SingleProcess:
    """A process group of one process."""

    rank, size = 0, 1

    def announce(self, work: Any) -> None:
        pass

    def sum_gradients(self, weights: Collection[Tensor], loss: Tensor) -> float:  # noqa: ARG002  # nothing to add
        return float(loss)

    def abandon(self, weights: Collection[Tensor]) -> None:
        pass


SINGLE_PROCESS = SingleProcess()


class TorchrunGroup:
    """The processes of torchrun.

    A step is one collective call, so that processes never wait in different calls.
    """

    def __init__(self, device: torch.device) -> None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def announce(self, work: Any) -> None:
        dist.broadcast_object_list([work], src=0, device=torch.device("cpu"))

    def next_work(self) -> Any:
        """Return the next announcement of the first process."""
        received = [None]
        dist.broadcast_object_list(received, src=0, device=torch.device("cpu"))
        return received[0]

    def sum_gradients(self, weights: Collection[Tensor], loss: Tensor) -> float:
        # A weight without a gradient sends zeros, since `abandon` sends as many numbers.
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1), loss.new_zeros(1)])
        dist.all_reduce(flat)
        if flat[-1] > 0:
            raise TrainingAbandoned
        pieces = torch.split(flat[:-2], [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        return float(flat[-2])

    def abandon(self, weights: Collection[Tensor]) -> None:
        flat = torch.cat([torch.zeros_like(weight).reshape(-1) for weight in weights])
        dist.all_reduce(torch.cat([flat, flat.new_tensor([0.0, 1.0])]))

    def close(self) -> None:
        """Wait for the other processes, then leave the group.

        A process that left early would destroy objects that threads of the others use, and these processes would abort.
        """
        with suppress(RuntimeError):  # a dead process delays nobody
            dist.barrier()
        dist.destroy_process_group()


def torchrun_group(device: torch.device) -> tuple[TorchrunGroup | None, torch.device]:
    """Return the processes of torchrun, and this process's device.

    Outside torchrun there is no group, and the first result is None.
    """
    if "RANK" not in os.environ:
        return None, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return TorchrunGroup(device), device
