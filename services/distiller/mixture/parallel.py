"""Parallel work over chunks, in threads and processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.prefetch import prefetch

C = TypeVar("C")
R = TypeVar("R")


class Reducer:
    """Threads for chunks, and torch.distributed processes for rows.

    One chunk for each thread is faster than threads that share each product, because such threads wait for the slowest
    one at every product. Results are added in the order of the chunks, so the number of threads does not change them.
    """

    def __init__(self, threads: int, group: "dist.ProcessGroup | None" = None) -> None:
        self.threads = threads
        self._group = group

    @contextmanager
    def workers(self) -> Iterator[None]:
        """Run a thread pool while the block runs, without torch's own threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads, "mixture", initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield
        finally:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def each(self, work: Callable[[C], R], chunks: Iterable[Callable[[], C]]) -> Iterator[R]:
        """Yield the result of `work` for every chunk, in order.

        Threads compute a few chunks ahead.
        """
        tasks = (partial(_worked, work, chunk) for chunk in chunks)
        return prefetch(tasks, self._pool.submit, ahead=self.threads)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all processes."""
        if self._group is None:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each number over all processes."""
        most = torch.tensor(list(numbers), dtype=torch.int64)
        if self._group is not None and len(numbers):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return [int(number) for number in most]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks."""
        if self._group is None:
            return rows
        parts: list[Tensor | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, rows.cpu(), group=self._group)
        return torch.cat([part for part in parts if part is not None]).to(rows.device)


def _worked(work: Callable[[C], R], chunk: Callable[[], C]) -> R:
    return work(chunk())
