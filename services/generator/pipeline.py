"""The pipeline of decoder and classifier.

Batches are decoded and sent ahead of the answer that is awaited.
"""

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from services.arrays import Array
from services.latent_space.rendering import Images
from services.prefetch import prefetch

# Batches under way for each decoder thread; bounds the memory of a search.
_AHEAD = 2


class Pending(Protocol):
    """Logits that have not arrived yet."""

    def result(self) -> Array: ...


B = TypeVar("B")
T = TypeVar("T")


class DecoderPool:
    """Threads that draw, decode and send batches in parallel.

    Each batch stays in one thread. Parallel batches are faster than parallel layers: threads that share a batch wait
    for each other at every layer, and on cores shared with the classifier the slowest thread is late (11,100 decoded
    and classified images a second against 9,800, with two threads on two cores that Triton shares).
    """

    def __init__(self, count: int, *, at_start: Callable[[], None] = lambda: None) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="decoder", initializer=at_start)

    def submit(self, make: Callable[[], T]) -> "Future[T]":
        """Run a task in a thread, in the caller's context.

        The task's spans thus belong to the caller's trace.
        """
        return self.pool.submit(contextvars.copy_context().run, make)

    def prefetch(self, makers: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Yield the result of each task, in order.

        The threads compute a few batches ahead.
        """
        return prefetch(makers, self.submit, ahead=_AHEAD * self.count)


def classified(
    batches: Iterable[B],
    render: Callable[[B], Images],
    submit: Callable[[Images], Pending],
    decoders: DecoderPool,
) -> Iterator[tuple[B, Array]]:
    """Yield each batch with the logits (n, k) of its rendered images, in order."""
    for batch, pending in decoders.prefetch(partial(_sent, batch, render, submit) for batch in batches):
        yield batch, pending.result()


def _sent(batch: B, render: Callable[[B], Images], submit: Callable[[Images], Pending]) -> tuple[B, Pending]:
    return batch, submit(render(batch))


def rounded(images: Images) -> Images:
    """Return images (n, c, h, w) in [0, 1], rounded to eight bits.

    They stay on their device.
    """
    return (images * 255).round() / 255
