"""What waits to be reported: bounded by number and by bytes, every one accounted for."""

import threading
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from defuse.hooks.counts import Counts, Tally

OBSERVATIONS, TRUTHS = "observations", "truths"
# Why something was refused: there was no room, or the monitor is closed.
FULL, CLOSED = "full", "closed"


class Item(Protocol):
    """What waits: some observations, or a truth."""

    @property
    def kind(self) -> str:
        """Which tally counts it."""

    @property
    def count(self) -> int:
        """How many of its kind it is."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""


class Buffer:
    """Takes what a program sees, and gives it to whoever reports it; drops what comes while it is full.

    The newest is dropped, not the oldest: what waits keeps its order, a truth that comes later still finds what it is
    about, and a caller pays for no removal. All of it is a few additions under a lock. The lock can be taken twice by
    one thread, since a signal's handler may ask a classifier while its thread is in here.
    """

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._lock = threading.RLock()
        self._items: deque[Item] = deque()
        self._tallies = {OBSERVATIONS: Tally(), TRUTHS: Tally()}
        # Of what is in the deque, and of that with what was taken out and is not settled.
        self._queued = 0
        self._held, self._held_bytes = 0, 0
        self._closed = False

    @property
    def queued(self) -> int:
        """How many wait to be taken out."""
        return self._queued

    def pass_over(self, kind: str, count: int) -> None:
        """Count what is not sampled."""
        with self._lock:
            tally = self._tallies[kind]
            tally.seen += count
            tally.not_sampled += count

    def drop(self, kind: str, count: int, reason: str) -> None:
        """Count what is dropped without having waited."""
        with self._lock:
            tally = self._tallies[kind]
            tally.seen += count
            tally.dropped[reason] += count

    def put(self, item: Item) -> int:
        """Take something in, or drop it; return how many wait to be taken out."""
        count, size = item.count, item.size
        with self._lock:
            full = self._held + count > self._capacity or self._held_bytes + size > self._capacity_bytes
            if full or self._closed:
                self.drop(item.kind, count, CLOSED if self._closed else FULL)
                return self._queued
            tally = self._tallies[item.kind]
            tally.seen += count
            tally.waiting += count
            self._held += count
            self._held_bytes += size
            self._queued += count
            self._items.append(item)
            return self._queued

    def take(self, most: int, most_bytes: int) -> list[Item]:
        """Take out the oldest: one at least where there is any, then as many as stay within bounds."""
        with self._lock:
            taken: list[Item] = []
            count = size = 0
            while self._items:
                count += self._items[0].count
                size += self._items[0].size
                if taken and (count > most or size > most_bytes):
                    break
                taken.append(self._items.popleft())
            self._queued -= sum(item.count for item in taken)
            return taken

    def settle(self, kind: str, *, stored: int = 0, dropped: Mapping[str, int]) -> None:
        """Count what became of things that were taken out."""
        with self._lock:
            tally = self._tallies[kind]
            tally.stored += stored
            tally.dropped.update(dropped)
            tally.waiting -= stored + sum(dropped.values())

    def release(self, items: list[Item]) -> None:
        """Make the room of things that were taken out free again."""
        with self._lock:
            self._held -= sum(item.count for item in items)
            self._held_bytes -= sum(item.size for item in items)

    def close(self) -> None:
        """Take nothing in any more."""
        with self._lock:
            self._closed = True

    def counts(self, kind: str) -> Counts:
        with self._lock:
            return self._tallies[kind].counts()
