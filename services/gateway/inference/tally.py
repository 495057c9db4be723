"""What this gateway has seen of trials, added to what all have seen, some of a second at a time."""

import asyncio
from collections import Counter, defaultdict

from services.gateway.trials import REFRESH_S, Trials
from services.runtime import telemetry
from services.runtime.worker import patiently


class Tally:
    """Counts in memory, so that no request waits for Redis."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._seen: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, trial_name: str, **figures: float) -> None:
        """Count for a trial; figures are those of `Trials.count`."""
        for figure, amount in figures.items():
            self._seen[trial_name][figure] += amount  # type: ignore[assignment]  # seconds are not whole
            telemetry.TRIALS.labels(trial_name, figure).inc(amount)

    async def run(self) -> None:
        """Hand over what was counted, for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await patiently(self.flush)

    async def flush(self) -> None:
        """Hand over what was counted until now."""
        while self._seen:
            name, figures = self._seen.popitem()
            try:
                await self._trials.count(name, figures)
            except BaseException:
                self._seen[name].update(figures)
                raise
