"""Paged lists (AIP-158) and read masks (AIP-157).

A page token names the last entry of a page, so it stays valid when entries are added.
"""

import base64
import hashlib
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from defuse.errors import InvalidInput
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

DEFAULT_SIZE, LARGEST_SIZE = 100, 500
# Largest size of a page in bytes, below gRPC's default message limit of 4 MiB.
MOST_BYTES = 3 << 20

M = TypeVar("M", bound=Message)
T = TypeVar("T")
# The position of an entry in its list: plain values that sort as the entries do.
Position = Sequence[Any]
Placed = tuple[Position, M]


@dataclass(frozen=True, kw_only=True)
class Page(Generic[M]):
    """Some entries of a list, and the next page's token.

    The token is empty on the last page.
    """

    entries: Sequence[M]
    next_page_token: str


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The requested page of a list."""

    # Identifies the list; a token of another list is rejected.
    subject: str
    size: int
    # Position of the last entry of the previous page; empty for the first page.
    after: Position

    @classmethod
    def of(cls, request: Any, *about: str) -> Self:
        """Read `page_size` and `page_token` of a request.

        `about` distinguishes the request's list from others. Raises InvalidInput for a negative size, and for the token
        of another list.
        """
        if request.page_size < 0:
            raise InvalidInput(
                f"the page size is {request.page_size}; give 0 for {DEFAULT_SIZE} entries, or how many you want",
                reason="BAD_PAGE_SIZE",
                field="page_size",
            )
        subject = "|".join([request.DESCRIPTOR.full_name, *about])
        size = min(request.page_size or DEFAULT_SIZE, LARGEST_SIZE)
        return cls(subject=subject, size=size, after=_position(subject, request.page_token))

    def page(self, placed: Iterable[Placed[M]]) -> Page[M]:
        """Return one page of entries that follow the previous page.

        The page has at least one entry, whatever its size in bytes, unless none is left.
        """
        entries: list[M] = []
        left, last = MOST_BYTES, self.after
        for position, entry in placed:
            left -= entry.ByteSize()
            if len(entries) == self.size or (entries and left < 0):
                return Page(entries=entries, next_page_token=_token(self.subject, last))
            entries.append(entry)
            last = position
        return Page(entries=entries, next_page_token="")

    async def page_of(self, placed: AsyncGenerator[Placed[M], None]) -> Page[M]:
        """Return one page of a stream of entries.

        No more entries are read than the page needs.
        """
        found: list[Placed[M]] = []
        async with aclosing(placed) as entries:
            async for entry in entries:
                found.append(entry)
                if len(found) > self.size:
                    break
        return self.page(found)

    def page_of_append_only(self, entries: Sequence[M]) -> Page[M]:
        """Return one page of a list that only grows.

        The position of an entry is its number.
        """
        numbers = self.after_cursor(range(len(entries)), lambda number: [number])
        return self.page((position, entries[number]) for position, number in numbers)

    def after_cursor(self, entries: Iterable[T], position: Callable[[T], Position]) -> list[tuple[Position, T]]:
        """Return the entries after the previous page, sorted by position."""
        placed = sorted(((list(position(entry)), entry) for entry in entries), key=lambda pair: pair[0])
        return [pair for pair in placed if pair[0] > list(self.after)]


def _token(subject: str, position: Position) -> str:
    content = json.dumps([_seal(subject, position), *position])
    return base64.urlsafe_b64encode(content.encode()).decode()


def _position(subject: str, token: str) -> Position:
    if not token:
        return ()
    try:
        seal, *position = json.loads(base64.urlsafe_b64decode(token))
        known = seal == _seal(subject, position)
    except (ValueError, TypeError, RecursionError):  # RecursionError comes from thousands of nested lists
        known, position = False, []
    if not known:
        raise InvalidInput(
            f"{token[:80]!r} is no page token of this list; give the `next_page_token` of the page before, with the "
            "same request",
            reason="BAD_PAGE_TOKEN",
            field="page_token",
        )
    return tuple(position)


def _seal(subject: str, position: Position) -> str:
    return hashlib.sha256(json.dumps([subject, *position]).encode()).hexdigest()[:16]


R = TypeVar("R", bound=Message)


class ReadMask(Generic[R]):
    """Restricts a message to named fields; an empty mask keeps all.

    Raises InvalidInput for a field that the resource does not have.
    """

    def __init__(self, kind: type[R], mask: FieldMask) -> None:
        self._kind = kind
        self._mask = mask
        descriptor: Any = kind.DESCRIPTOR
        for path in mask.paths:
            if not FieldMask(paths=[path]).IsValidForDescriptor(descriptor):
                known = ", ".join(field.name for field in descriptor.fields)
                raise InvalidInput(
                    f"read_mask names {path!r}, which a {descriptor.name} does not have; its fields are {known}",
                    reason="UNKNOWN_FIELD",
                )

    def of(self, message: R) -> R:
        """Return the masked message."""
        if not self._mask.paths:
            return message
        kept = self._kind()
        self._mask.MergeMessage(message, kept)
        return kept
