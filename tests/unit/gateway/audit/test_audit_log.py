"""Events in a real store: found again newest first, page by page."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from defuse.v1 import audit_pb2
from defuse.v1 import gateway_service_pb2 as pb

from services.gateway.audit.audit_log import AuditLog
from services.gateway.records.paging import Cursor
from services.storage.artifacts import ArtifactStore

# Seven events of three days; the second day begins after the third event.
BEGIN = datetime(2026, 11, 24, 21, 0, 0, 250, tzinfo=UTC)
COUNT = 7


def event(number: int) -> audit_pb2.AuditEvent:
    told = audit_pb2.AuditEvent(caller=f"caller {number}")
    told.time.FromDatetime(BEGIN + number * timedelta(hours=7))
    return told


@pytest.fixture
def kept(store: ArtifactStore) -> AuditLog:
    found = AuditLog(store)

    async def keep() -> None:
        for number in (3, 0, 6, 1, 5, 2, 4):
            await found.keep(event(number))

    asyncio.run(keep())
    return found


def page(of: AuditLog, size: int = 0, token: str = "") -> tuple[list[str], str]:
    """Return the callers of a page's events, and the token of the next page."""
    found = of.page(Cursor.of(pb.ListAuditEventsRequest(page_size=size, page_token=token)))
    return [one.caller for one in found.entries], found.next_page_token


def pages(of: AuditLog, size: int) -> list[list[str]]:
    """Return the callers of all events, page by page."""
    found, token = page(of, size)
    every = [found]
    while token:
        found, token = page(of, size, token)
        every.append(found)
    return every


@pytest.mark.parametrize("size", [1, 2, 3, COUNT, 50, 0])
def test_newest_first(kept: AuditLog, size: int) -> None:
    """Every event comes once, whatever the size of the pages, and no page is empty."""
    newest = [f"caller {number}" for number in reversed(range(COUNT))]
    step = size or COUNT
    assert pages(kept, size) == [newest[begin : begin + step] for begin in range(0, COUNT, step)]


def test_events_that_come_meanwhile(kept: AuditLog) -> None:
    """They are on a new first page, and change nothing of the pages that follow."""
    _, token = page(kept, 3)
    asyncio.run(kept.keep(event(COUNT)))
    assert page(kept, 2, token)[0] == ["caller 3", "caller 2"]
    assert page(kept, 1)[0] == [f"caller {COUNT}"]


def test_nothing_happened(store: ArtifactStore) -> None:
    assert page(AuditLog(store)) == ([], "")


def test_what_is_no_event(kept: AuditLog, store: ArtifactStore) -> None:
    """Foreign files in the folder of a day are skipped."""
    store.write_bytes("audit/2026-11-25/notes.txt", b"by hand")
    assert len(page(kept)[0]) == COUNT


def test_a_day_is_a_folder(kept: AuditLog, store: ArtifactStore, tmp_path: Path) -> None:
    """An operator keeps or deletes events by the day."""
    assert store.keys("audit") == ["audit/2026-11-24", "audit/2026-11-25", "audit/2026-11-26"]
    assert store.keys("audit/2026-11-24")[0].startswith("audit/2026-11-24/210000.000250-")


def test_a_store_that_takes_nothing_fails_no_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An event that cannot be stored is logged."""
    (tmp_path / "file").touch()
    asyncio.run(AuditLog(ArtifactStore(f"file://{tmp_path}/file/store")).keep(event(1)))
    assert "audit_not_stored" in capsys.readouterr().out
