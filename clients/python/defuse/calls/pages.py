"""Lists, read page by page."""

from typing import Any

from defuse.steps import Call, Steps


def listed(method: str, request: Any, entries: str) -> Steps[list[Any]]:
    """Return the entries of all pages of a list."""
    found: list[Any] = []
    while True:
        answer = yield Call(method=method, request=request)
        found += getattr(answer, entries)
        if not answer.next_page_token:
            return found
        request.page_token = answer.next_page_token
