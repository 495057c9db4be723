"""Bounds and counts of the buffer."""

import threading
from dataclasses import dataclass

from defuse.hooks.buffer import CLOSED, FULL, OBSERVATIONS, TRUTHS, Buffer


@dataclass(frozen=True)
class Thing:
    count: int
    size: int
    kind: str = OBSERVATIONS


def test_new_items_are_dropped() -> None:
    """Items over either bound are dropped.

    A smaller later item may still fit.
    """
    buffer = Buffer(10, 100)
    for thing in (Thing(4, 10), Thing(7, 10), Thing(4, 91), Thing(6, 90), Thing(1, 1, TRUTHS)):
        buffer.put(thing)
    counts = buffer.counts(OBSERVATIONS)
    assert (counts.seen, counts.waiting, counts.dropped) == (21, 10, {FULL: 11})
    assert buffer.counts(TRUTHS).dropped == {FULL: 1}
    assert buffer.take(100, 1000) == [Thing(4, 10), Thing(6, 90)]


def test_take() -> None:
    """Items are taken in order, at least one.

    Their room is free after the release.
    """
    buffer = Buffer(10, 1000)
    assert buffer.put(Thing(8, 8)) == 8
    assert buffer.put(Thing(2, 2, TRUTHS)) == 10
    assert buffer.take(3, 5) == [Thing(8, 8)]
    assert buffer.put(Thing(1, 1)) == 2
    assert buffer.counts(OBSERVATIONS).dropped == {FULL: 1}
    buffer.settle(OBSERVATIONS, stored=5, dropped={"refused": 3})
    assert buffer.counts(OBSERVATIONS).waiting == 0
    buffer.release([Thing(8, 8)])
    assert buffer.put(Thing(8, 8)) == 10
    assert buffer.take(100, 100) == [Thing(2, 2, TRUTHS), Thing(8, 8)]
    assert buffer.take(100, 100) == []


def test_closed() -> None:
    buffer = Buffer(10, 10)
    buffer.close()
    buffer.put(Thing(1, 1))
    assert buffer.counts(OBSERVATIONS).dropped == {CLOSED: 1}


def test_many_threads() -> None:
    """Concurrent threads leave every observation counted exactly once."""
    buffer = Buffer(50, 1000)
    over = threading.Event()

    def put() -> None:
        for _ in range(2_000):
            buffer.put(Thing(1, 1))
            buffer.count_unsampled(OBSERVATIONS, 1)

    def take() -> None:
        while not over.is_set() or buffer.counts(OBSERVATIONS).waiting:
            taken = buffer.take(7, 100)
            buffer.settle(OBSERVATIONS, stored=len(taken), dropped={})
            buffer.release(taken)
            counts = buffer.counts(OBSERVATIONS)
            assert counts.seen == counts.not_sampled + counts.stored + counts.waiting + sum(counts.dropped.values())

    reader, writers = threading.Thread(target=take), [threading.Thread(target=put) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    counts = buffer.counts(OBSERVATIONS)
    assert (counts.seen, counts.not_sampled, counts.waiting) == (16_000, 8_000, 0)
    assert counts.stored + counts.dropped.get(FULL, 0) == 8_000
