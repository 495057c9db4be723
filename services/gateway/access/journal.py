"""What callers changed, kept in the artifact store: one object an event, a folder a day."""

import asyncio
import base64
import binascii
import re
import uuid
from collections.abc import Iterator
from datetime import UTC
from itertools import islice

from defuse.errors import DefuseError, InvalidInput
from defuse.v1 import audit_pb2

from services.runtime import catalog, telemetry
from services.runtime.artifacts import ArtifactStore

_PAGE, _LARGEST_PAGE = 50, 1000
_KEY = re.compile(rf"{catalog.AUDIT}/\d{{4}}-\d\d-\d\d/\d{{6}}\.\d{{6}}-[0-9a-f]{{6}}\.pb")


class Journal:
    """Keeps and lists events."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def keep(self, event: audit_pb2.AuditEvent) -> None:
        """Store an event; where that is not possible it is in the log alone, and the call that it tells of goes on."""
        key = catalog.audit_event(event.time.ToDatetime(UTC), uuid.uuid4().hex[:6])
        try:
            await asyncio.to_thread(self._store.write_message, key, event)
        except (DefuseError, OSError) as error:
            telemetry.log().error("audit_not_stored", method=event.method, caller=event.caller, error=str(error))

    def list(self, *, page_size: int, page_token: str) -> tuple[list[audit_pb2.AuditEvent], str]:
        """Return the next events, newest first, and the token of the page after them; none where there is no more."""
        if page_size < 0:
            raise InvalidInput(f"page_size is {page_size}; give 0 or more", reason="OUT_OF_BOUNDS", field="page_size")
        size = min(page_size or _PAGE, _LARGEST_PAGE)
        keys = list(islice(self._keys(before=_key_of(page_token)), size + 1))
        events = [self._store.read_message(key, audit_pb2.AuditEvent) for key in keys[:size]]
        return events, _token_of(keys[size - 1]) if len(keys) > size else ""

    def _keys(self, *, before: str) -> Iterator[str]:
        for day in reversed(self._store.keys(catalog.AUDIT)):
            if not before or day <= before:
                yield from (
                    key
                    for key in reversed(self._store.keys(day))
                    if _KEY.fullmatch(key) and (not before or key < before)
                )


def _token_of(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _key_of(token: str) -> str:
    """Return the key that a page begins behind; nothing without a token."""
    try:
        key = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        key = "?"
    if key and not _KEY.fullmatch(key):
        raise InvalidInput(
            f"{token!r} is no page token; give the `next_page_token` of a page, or none",
            reason="BAD_PAGE_TOKEN",
            field="page_token",
        )
    return key
