"""What a hook says in the log: each thing once a minute at most, however often it happens."""

import logging
import math
import time

_LOGGER = logging.getLogger("defuse.hooks")
_EVERY_S = 60.0


class Complaints:
    """Logs what goes wrong, by reason; what is said only once is never said again."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def say(self, reason: str, message: str) -> None:
        now = time.monotonic()
        if now - self._said.get(reason, -math.inf) >= _EVERY_S:
            self._said[reason] = now
            _LOGGER.warning("%s: %s; monitor.counts says how often", reason, message)

    def say_once(self, reason: str, message: str, error: Exception) -> None:
        """Log a defect, with where it happened."""
        if reason not in self._said:
            self._said[reason] = math.inf
            _LOGGER.error("%s: %s; monitor.counts says how often", reason, message, exc_info=error)
