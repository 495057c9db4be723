"""What callers changed, kept in the artifact store: one object an event, a folder a day."""

import asyncio
import re
import uuid
from collections.abc import Iterator
from datetime import UTC

from defuse.errors import DefuseError
from defuse.v1 import audit_pb2

from services.gateway.paging import Cursor, Page
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_KEY = re.compile(rf"{keys.AUDIT}/\d{{4}}-\d\d-\d\d/\d{{6}}\.\d{{6}}-[0-9a-f]{{6}}\.pb")


class Journal:
    """Keeps and lists events."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def keep(self, event: audit_pb2.AuditEvent) -> None:
        """Store an event; where that is not possible it is in the log alone, and the call that it tells of goes on."""
        key = keys.audit_event(event.time.ToDatetime(UTC), uuid.uuid4().hex[:6])
        try:
            await asyncio.to_thread(self._store.write_message, key, event)
        except (DefuseError, OSError) as error:
            telemetry.log().error("audit_not_stored", method=event.method, caller=event.caller, error=str(error))

    def page(self, cursor: Cursor) -> Page[audit_pb2.AuditEvent]:
        """Return the next events, newest first."""
        before = str(cursor.after[0]) if cursor.after else ""
        return cursor.page(
            ([key], self._store.read_message(key, audit_pb2.AuditEvent)) for key in self._keys(before=before)
        )

    def _keys(self, *, before: str) -> Iterator[str]:
        for day in reversed(self._store.keys(keys.AUDIT)):
            if not before or day <= before:
                yield from (
                    key
                    for key in reversed(self._store.keys(day))
                    if _KEY.fullmatch(key) and (not before or key < before)
                )
