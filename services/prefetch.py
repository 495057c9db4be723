"""Prefetching: tasks run a few ahead of the consumer of their results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    tasks: Iterable[Callable[[], T]], submit: Callable[[Callable[[], T]], "Future[T]"], *, ahead: int
) -> Iterator[T]:
    """Yield the result of each task, in order.

    `submit` starts tasks, at most `ahead` before the one whose result is yielded.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # a reader that stops early leaves no task waiting
        for future in waiting:
            future.cancel()
