"""Observations that are older than a model's retention go, an hour at a time.

Each gateway does it: what one has removed the others do not find.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from defuse import names
from defuse.errors import DefuseError

from services.gateway.monitoring import config
from services.gateway.monitoring.reports import HOUR
from services.runtime import telemetry
from services.storage import keys
from services.storage.artifacts import ArtifactStore

_LOOK_EVERY_S = 60.0


class Retention:
    """Removes what is old."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def run(self) -> None:
        """Look again and again until the task is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.remove_old, datetime.now(UTC))
            except (DefuseError, OSError) as error:
                telemetry.log().warning("retention_waits", error=str(error), retry_s=_LOOK_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    def remove_old(self, now: datetime) -> None:
        """Remove the hours of all models that are past their retention."""
        for model_name in self._store.keys("models"):
            if hours := self._store.keys(keys.observed_hours(model_name)):
                kept = config.retention(config.read(self._store, model_name))
                for hour in past(hours, kept, now):
                    self._remove(hour)

    def _remove(self, hour: str) -> None:
        for batch in self._store.keys(hour):
            self._store.remove(keys.reported(batch))  # first: it is there whole or not at all
        self._store.remove_below(hour)
        telemetry.log().info("observations_expired", hour=hour)


def past(hours: Iterable[str], kept: timedelta, now: datetime) -> Iterator[str]:
    """Yield the keys of hours whose last moment is further away than observations are kept."""
    for hour in hours:
        with suppress(ValueError):  # of something that is no hour
            begin = datetime.strptime(names.last(hour), HOUR).replace(tzinfo=UTC)
            if begin + timedelta(hours=1) + kept < now:
                yield hour
