"""The thread that reports: a daemon, started when there is something to report."""

import threading

from defuse.hooks.batches import MOST_OBSERVATIONS
from defuse.hooks.courier import Courier
from defuse.hooks.reporter import Reporter

# How long an observation waits for others at most.
PERIOD_S = 1.0
# How long a thread is waited for whose calls were given up.
_END_S = 1.0


class Background:
    """Has a reporter report what waits, once in a period, and at once when a batch is full."""

    def __init__(self, reporter: Reporter, courier: Courier) -> None:
        self._reporter = reporter
        self._courier = courier
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; no effect where it was started."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="defuse-monitor", daemon=True)
                    thread.start()
                    self._thread = thread

    def tell(self, waiting: int) -> None:
        """Say how many observations wait; the thread is not woken for each, which would cost its caller."""
        if waiting >= MOST_OBSERVATIONS and not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Report what waits, for so long at most, and end the thread."""
        self._closing.set()
        self._wake.set()
        self._courier.hurry()
        if self._thread:
            self._thread.join(timeout_s)
        self._courier.stop()
        if self._thread:
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(PERIOD_S)
            self._wake.clear()
            self._reporter.report_waiting()
        self._reporter.report_waiting()
