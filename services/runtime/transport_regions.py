"""The shared memory that is registered at one Triton, and what it takes to unregister it."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tritonclient.utils import InferenceServerException

from services.runtime.transport import Refused
from services.runtime.triton_errors import is_away, meaning_of


class Regions:
    """Registers and unregisters regions of one kind. Safe to use from several threads."""

    def __init__(self, url: str, *, register: Callable[..., None], unregister: Callable[[str], None]) -> None:
        self._url = url
        self._register = register
        self._unregister = unregister
        self._leaving: deque[tuple[str, Callable[[], None]]] = deque()

    def add(self, name: str, *details: Any) -> None:
        """Register a region; raise Refused with Triton's words, or Unavailable while it does not answer."""
        self.remove_leaving()
        try:
            self._register(name, *details)
        except InferenceServerException as error:
            if is_away(error):
                raise meaning_of(error, self._url) from error
            raise Refused(f"Triton at {self._url} does not take it ({error.message()})") from error

    def remove(self, name: str, free: Callable[[], None]) -> None:
        """Unregister a region and free it, or do both later if Triton does not answer or still uses it."""
        self.remove_later(name, free)
        self.remove_leaving()

    def remove_later(self, name: str, free: Callable[[], None]) -> None:
        """Unregister and free a region with the next one that comes or goes."""
        self._leaving.append((name, free))

    def remove_leaving(self) -> None:
        """Unregister what Triton lets go of: it keeps a region while a request uses it, also one that was given up."""
        kept = []
        with suppress(IndexError):  # of a deque that another thread empties
            while True:
                name, free = self._leaving.popleft()
                try:
                    self._unregister(name)
                except InferenceServerException as error:
                    kept.append((name, free))
                    if is_away(error):
                        break
                else:
                    free()
        self._leaving.extend(kept)
