"""The shared memory that is registered at one Triton, and what it takes to unregister it."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tritonclient.utils import InferenceServerException

from services.runtime.transport import Refused
from services.runtime.triton_errors import is_away, meaning_of

# How the names of the services' regions begin; then the process id, which tells an operator whose they are.
OURS = "defuse-"
# Triton lets go of a request's memory a moment after it has answered.
_LETTING_GO_S = 1.0
_POLL_S = 0.001


class Regions:
    """Registers and unregisters regions of one kind. Safe to use from several threads."""

    def __init__(self, url: str, *, register: Callable[..., None], unregister: Callable[[str], None]) -> None:
        self._url = url
        self._register = register
        self._unregister = unregister
        # Regions of requests that were given up, which may still run.
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
        """Unregister a region that no request uses any more, and free it."""
        deadline = time.monotonic() + _LETTING_GO_S
        while refusal := self._refusal(name, free):
            if is_away(refusal) or time.monotonic() > deadline:
                self.remove_later(name, free)
                return
            time.sleep(_POLL_S)

    def remove_later(self, name: str, free: Callable[[], None]) -> None:
        """Unregister and free a region, which a request may still use, once Triton lets go of it."""
        self._leaving.append((name, free))

    def remove_leaving(self) -> bool:
        """Unregister what Triton has let go of; say whether it still uses some."""
        with suppress(IndexError):  # another thread may empty the deque
            for _ in range(len(self._leaving)):
                name, free = self._leaving.popleft()
                if refusal := self._refusal(name, free):
                    self.remove_later(name, free)
                    if is_away(refusal):
                        return False
        return bool(self._leaving)

    def close(self) -> None:
        """Unregister all that Triton lets go of soon; the next process finds what is left."""
        deadline = time.monotonic() + _LETTING_GO_S
        while self.remove_leaving() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _refusal(self, name: str, free: Callable[[], None]) -> InferenceServerException | None:
        """Unregister a region and free it; return why not, if not."""
        try:
            self._unregister(name)
        except InferenceServerException as error:
            return error
        free()
        return None
