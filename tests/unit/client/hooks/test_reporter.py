"""What a gateway refuses, and what that does to the observations that are reported with it."""

from collections.abc import Iterable
from datetime import UTC, datetime

import grpc
import pytest
from defuse.connection import Credentials
from defuse.hooks import DeliveryCounts, Observation
from defuse.hooks.buffer import OBSERVATIONS, Buffer
from defuse.hooks.observation import LoggedObservation
from defuse.hooks.reporter import Reporter
from defuse.hooks.uploader import ThrottledLog, Uploader

from tests.unit.client.hooks.servers import MODEL, Gateway


def reported(gateway: Gateway, observations: Iterable[tuple[str, int]]) -> DeliveryCounts:
    """Report observations, by id and size of the image, all at once."""
    buffer, log = Buffer(1_000, 1 << 30), ThrottledLog()
    for id_, size in observations:
        buffer.put(LoggedObservation(Observation(model=MODEL, id=id_, time=datetime.now(UTC), input=bytes(size))))
    uploader = Uploader(gateway.address, Credentials("", gateway.address), log)
    Reporter(buffer, uploader, log, None).report_queued()
    uploader.close()
    return buffer.counts(OBSERVATIONS)


def test_images_of_another_size(gateway: Gateway) -> None:
    """They are reported apart: the gateway refuses a batch as a whole."""
    gateway.codes = [grpc.StatusCode.INVALID_ARGUMENT]
    counts = reported(gateway, [(f"a{number}", 4 + number % 2) for number in range(6)])
    assert (counts.stored, counts.dropped, counts.waiting) == (3, {"invalid_argument": 3}, 0)
    assert set(gateway.stored) == {"a1", "a3", "a5"}


@pytest.mark.parametrize(("bad", "reports", "stored"), [(3, 4, 10), (20, 8, 0)])
def test_what_is_refused_by_its_id(gateway: Gateway, bad: int, reports: int, stored: int) -> None:
    """The others are reported without it; where it is another one again and again, none is."""
    ids = [f"{kind}{number}" for kind, count in (("a", 10), ("bad", bad)) for number in range(count)]
    counts = reported(gateway, [(id_, 4) for id_ in ids])
    assert (counts.stored, counts.dropped) == (stored, {"invalid_argument": len(ids) - stored})
    assert len(gateway.calls) == reports
    assert len(gateway.stored) == stored


def test_the_only_one(gateway: Gateway) -> None:
    assert reported(gateway, [("bad", 4)]).dropped == {"invalid_argument": 1}
    assert len(gateway.calls) == 1


def test_an_id_twice(gateway: Gateway) -> None:
    """It is stored once; the second time it is counted as repeated, in a batch of its own, which is not refused."""
    counts = reported(gateway, [("a", 4), ("b", 4), ("a", 4)])
    assert (counts.stored, counts.dropped) == (2, {"repeated": 1})
