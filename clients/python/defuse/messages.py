"""Settings as messages of the contract."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from defuse.errors import InvalidInput

M = TypeVar("M")


def message(kind: Callable[..., M], values: Mapping[str, Any]) -> M:
    """Return a message with these values; those that are None are left out. Raises InvalidInput that shows them."""
    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"settings {dict(values)} are not valid: {error}") from error
