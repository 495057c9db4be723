"""A bounded buffer of items to report, with counts of their delivery."""

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

OBSERVATIONS, TRUTHS = "observations", "truths"
# Reasons of drops: the buffer is full, or the monitor is closed.
FULL, CLOSED = "full", "closed"


class Dropped(Exception):
    """Raised when an item is not reported; it never reaches the program.

    `reason` is counted, and `message` is logged. `observation_id` is the id of the observation at fault in a batch, if
    it is known.
    """

    def __init__(self, reason: str, message: str, *, observation_id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.observation_id = observation_id


@dataclass(frozen=True, kw_only=True)
class DeliveryCounts:
    """Delivery counts of observations, or of truths.

    At any time `seen` is the sum of `not_sampled`, `stored`, `waiting` and all of `dropped`.
    """

    seen: int
    not_sampled: int
    # At the gateway.
    stored: int
    # In this process, not yet delivered.
    waiting: int
    # By reason.
    dropped: Mapping[str, int]

    @property
    def sampled(self) -> int:
        """Return the number of sampled items."""
        return self.seen - self.not_sampled


@dataclass(kw_only=True)
class DeliveryCounter:
    """Mutable delivery counts, which their owner locks."""

    seen: int = 0
    not_sampled: int = 0
    stored: int = 0
    waiting: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def snapshot(self) -> DeliveryCounts:
        """Return the counts so far."""
        return DeliveryCounts(
            seen=self.seen,
            not_sampled=self.not_sampled,
            stored=self.stored,
            waiting=self.waiting,
            dropped=dict(self.dropped),
        )


class BufferedItem(Protocol):
    """An item to report: the observations of one request, or one truth."""

    @property
    def kind(self) -> str:
        """Return OBSERVATIONS or TRUTHS."""

    @property
    def count(self) -> int:
        """Return the number of observations or truths."""

    @property
    def size(self) -> int:
        """Return the size in bytes."""


class Buffer:
    """A thread-safe queue with bounds on items and bytes.

    A full buffer drops new items. Dropping new items instead of old ones keeps the
    order: a later truth still finds its observation. It is also cheaper for the caller,
    who only pays for a few additions under a lock. The lock is reentrant, since a
    signal handler may run an inference while its thread holds the lock.

    Items count towards both bounds until `release`. `settle` records the delivery of items that were taken.
    """

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._lock = threading.RLock()
        self._items: deque[BufferedItem] = deque()
        self._counters = {OBSERVATIONS: DeliveryCounter(), TRUTHS: DeliveryCounter()}
        # Items in the deque; items in the deque or taken, but not released.
        self._queued = 0
        self._held, self._held_bytes = 0, 0
        self._closed = False

    @property
    def queued(self) -> int:
        """Return the number of queued observations and truths."""
        return self._queued

    def count_unsampled(self, kind: str, count: int) -> None:
        """Count items that are not sampled."""
        with self._lock:
            counter = self._counters[kind]
            counter.seen += count
            counter.not_sampled += count

    def count_dropped(self, kind: str, count: int, reason: str) -> None:
        """Count items that are dropped before they are queued."""
        with self._lock:
            counter = self._counters[kind]
            counter.seen += count
            counter.dropped[reason] += count

    def put(self, item: BufferedItem) -> int:
        """Queue or drop an item, and return the number of queued ones."""
        count, size = item.count, item.size
        with self._lock:
            full = self._held + count > self._capacity or self._held_bytes + size > self._capacity_bytes
            if full or self._closed:
                self.count_dropped(item.kind, count, CLOSED if self._closed else FULL)
                return self._queued
            counter = self._counters[item.kind]
            counter.seen += count
            counter.waiting += count
            self._held += count
            self._held_bytes += size
            self._queued += count
            self._items.append(item)
            return self._queued

    def take(self, max_count: int, max_bytes: int) -> list[BufferedItem]:
        """Remove and return the oldest items within bounds.

        At least one item is returned, if there is any.
        """
        with self._lock:
            taken: list[BufferedItem] = []
            count = size = 0
            while self._items:
                count += self._items[0].count
                size += self._items[0].size
                if taken and (count > max_count or size > max_bytes):
                    break
                taken.append(self._items.popleft())
            self._queued -= sum(item.count for item in taken)
            return taken

    def settle(self, kind: str, *, stored: int = 0, dropped: Mapping[str, int]) -> None:
        """Count the delivery or the drop of taken items."""
        with self._lock:
            counter = self._counters[kind]
            counter.stored += stored
            counter.dropped.update(dropped)
            counter.waiting -= stored + sum(dropped.values())

    def release(self, items: list[BufferedItem]) -> None:
        """Free the space of taken items."""
        with self._lock:
            self._held -= sum(item.count for item in items)
            self._held_bytes -= sum(item.size for item in items)

    def close(self) -> None:
        """Drop all further items."""
        with self._lock:
            self._closed = True

    def counts(self, kind: str) -> DeliveryCounts:
        """Return the counts of OBSERVATIONS or TRUTHS."""
        with self._lock:
            return self._counters[kind].snapshot()
