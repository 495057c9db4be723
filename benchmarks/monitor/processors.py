"""Processors shared out as machines are: the program that is measured on its own, what it asks on another one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def elsewhere() -> Iterator[None]:
    """Start what would be on other machines: it gets the last processor, and `here` all others."""
    with _on(_processors()[-1:]):
        yield


@contextmanager
def here() -> Iterator[None]:
    """Start what is measured, on all processors but the last."""
    with _on(_processors()[:-1]):
        yield


def _processors() -> list[int]:
    """Return those that this process may use; where the system does not say, or there is one, nothing is shared out."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def _on(processors: list[int]) -> Iterator[None]:
    """Let processes that the block starts inherit some processors."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
