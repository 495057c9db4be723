import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import model_pb2
from google.longrunning import operations_proto_pb2 as longrunning_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.records.paging import DEFAULT_SIZE, LARGEST_SIZE, MOST_BYTES, Cursor

Model = model_pb2.Model


def asked(size: int = 0, token: str = "", *about: str) -> Cursor:
    return Cursor.of(longrunning_pb2.ListOperationsRequest(page_size=size, page_token=token), *about)


def named(*names: str) -> list[model_pb2.Model]:
    return [Model(name=name) for name in names]


def position(model: model_pb2.Model) -> list[str]:
    return [model.name]


def read_all(models: list[model_pb2.Model], size: int) -> list[list[str]]:
    """Return the names on each page."""
    pages, token = [], ""
    while True:
        cursor = asked(size, token)
        page = cursor.page(cursor.after_cursor(models, position))
        pages.append([model.name for model in page.entries])
        token = page.next_page_token
        if not token:
            return pages


@given(st.sets(st.text(min_size=1, max_size=3)), st.integers(1, 7))
def test_pages_together_are_the_list(names: set[str], size: int) -> None:
    """Every entry is on one page, in order; pages are full but for the last, and none is empty unless the list is."""
    pages = read_all(named(*names), size)
    assert [name for page in pages for name in page] == sorted(names)
    assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
    assert pages[-1] or not names


def test_tokens_stay_right_when_entries_are_added() -> None:
    """No entry is read twice or left out, wherever new entries are added."""
    cursor = asked(2)
    first = cursor.page(cursor.after_cursor(named("b", "d", "f"), position))
    cursor = asked(2, first.next_page_token)
    second = cursor.page(cursor.after_cursor(named("a", "b", "c", "d", "e", "f"), position))
    assert [model.name for model in second.entries] == ["e", "f"]
    assert second.next_page_token == ""


@pytest.mark.parametrize(("wanted", "given_"), [(0, DEFAULT_SIZE), (7, 7), (10**6, LARGEST_SIZE)])
def test_how_large_a_page_is(wanted: int, given_: int) -> None:
    """None takes the default, too many the largest."""
    assert asked(wanted).size == given_


def test_a_negative_size() -> None:
    """It is refused with itself and what to give."""
    with pytest.raises(InvalidInput, match="the page size is -1; give 0") as caught:
        asked(-1)
    assert caught.value.reason == "BAD_PAGE_SIZE"


def test_a_page_fits_a_message() -> None:
    """Large entries make a page shorter, but never empty."""
    large = [Model(name=name, input_name="x" * size) for name, size in (("a", 10), ("b", MOST_BYTES), ("c", 10))]
    assert read_all(large, 10) == [["a"], ["b"], ["c"]]


def token_of(*about: str) -> str:
    cursor = asked(1, "", *about)
    return str(cursor.page(cursor.after_cursor(named("a", "b"), position)).next_page_token)


DEEP = base64.urlsafe_b64encode(b"[" * 100_000).decode()


@pytest.mark.parametrize("token", ["a", "é", "AAAA", "W10=", token_of("other"), token_of()[:-8], "bnVsbA==", DEEP])
def test_a_token_of_something_else(token: str) -> None:
    """A token of another list, or none at all, is refused with what to give."""
    with pytest.raises(InvalidInput, match="is no page token of this list; give the `next_page_token`") as caught:
        asked(1, token)
    assert caught.value.reason == "BAD_PAGE_TOKEN"


def test_read_no_further_than_needed() -> None:
    """Of entries that are read one by one, one more than fits is read, and the reader is closed."""
    read: list[Any] = []

    async def source() -> AsyncIterator[Any]:
        try:
            for model in named("a", "b", "c", "d"):
                read.append(model.name)
                yield position(model), model
        finally:
            read.append("closed")

    page = asyncio.run(asked(2).page_of(source()))
    assert [model.name for model in page.entries] == ["a", "b"]
    assert page.next_page_token
    assert read == ["a", "b", "c", "closed"]
