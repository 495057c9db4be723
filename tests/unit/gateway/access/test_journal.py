"""Events in a real store: found again newest first, page by page."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import audit_pb2

from services.gateway.access import journal
from services.gateway.access.journal import Journal
from services.runtime.artifacts import ArtifactStore

# Seven events of three days; the second day begins after the third event.
BEGIN = datetime(2026, 11, 24, 21, 0, 0, 250, tzinfo=UTC)
COUNT = 7
Pages = Callable[[int], list[list[str]]]


def event(number: int) -> audit_pb2.AuditEvent:
    told = audit_pb2.AuditEvent(caller=f"caller {number}")
    told.time.FromDatetime(BEGIN + number * timedelta(hours=7))
    return told


@pytest.fixture
def kept(store: ArtifactStore) -> Journal:
    found = Journal(store)

    async def keep() -> None:
        for number in (3, 0, 6, 1, 5, 2, 4):
            await found.keep(event(number))

    asyncio.run(keep())
    return found


def pages(of: Journal, size: int) -> list[list[str]]:
    """Return the callers of all events, page by page."""
    found, token = [], ""
    while True:
        events, token = of.list(page_size=size, page_token=token)
        found.append([one.caller for one in events])
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 2, 3, COUNT, 50, 0])
def test_newest_first(kept: Journal, size: int) -> None:
    """Every event comes once, whatever the size of the pages, and no page is empty."""
    newest = [f"caller {number}" for number in reversed(range(COUNT))]
    step = size or COUNT
    assert pages(kept, size) == [newest[begin : begin + step] for begin in range(0, COUNT, step)]


def test_events_that_come_meanwhile(kept: Journal) -> None:
    """They are on a new first page, and change nothing of the pages that follow."""
    _, token = kept.list(page_size=3, page_token="")
    asyncio.run(kept.keep(event(COUNT)))
    events, _ = kept.list(page_size=2, page_token=token)
    assert [one.caller for one in events] == ["caller 3", "caller 2"]
    assert kept.list(page_size=1, page_token="")[0][0].caller == f"caller {COUNT}"


def test_nothing_happened(store: ArtifactStore) -> None:
    assert Journal(store).list(page_size=0, page_token="") == ([], "")


def test_large_pages_are_made_smaller(kept: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page has a largest size, and a size of its own where none is asked for."""
    monkeypatch.setattr(journal, "_LARGEST_PAGE", 4)
    monkeypatch.setattr(journal, "_PAGE", 2)
    assert [len(kept.list(page_size=size, page_token="")[0]) for size in (0, 3, 4, 5, 1_000_000)] == [2, 3, 4, 4, 4]


@pytest.mark.parametrize("token", ["x", "nonsense", "ščř", "cnVucy9maXJzdC9ydW4ucGI="])
def test_what_is_no_token(kept: Journal, token: str) -> None:
    """Only what a page gave leads on; a key of something else does not."""
    with pytest.raises(InvalidInput, match="is no page token") as refused:
        kept.list(page_size=1, page_token=token)
    assert refused.value.field == "page_token"


def test_a_negative_page(kept: Journal) -> None:
    with pytest.raises(InvalidInput, match="page_size is -1"):
        kept.list(page_size=-1, page_token="")


def test_a_day_is_a_folder(kept: Journal, store: ArtifactStore, tmp_path: Path) -> None:
    """An operator keeps or deletes events by the day."""
    assert store.keys("audit") == ["audit/2026-11-24", "audit/2026-11-25", "audit/2026-11-26"]
    assert store.keys("audit/2026-11-24")[0].startswith("audit/2026-11-24/210000.000250-")


def test_a_store_that_takes_nothing_fails_no_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be stored is said in the log."""
    (tmp_path / "file").touch()
    asyncio.run(Journal(ArtifactStore(f"file://{tmp_path}/file/store")).keep(event(1)))
    assert "audit_not_stored" in capsys.readouterr().out
