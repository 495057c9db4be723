"""Events of inference that become observations: request and answer come separately, in either order."""

import asyncio
from contextlib import suppress

from defuse.errors import Conflict, DefuseError, InvalidInput

from services.gateway.monitoring.cloud_events import CloudEvent
from services.gateway.monitoring.halves import Halves, Pair
from services.gateway.monitoring.payloads import REQUEST, RESPONSE, half_of, joined
from services.gateway.monitoring.receiving import Batch
from services.gateway.monitoring.reports import Reports
from services.gateway.monitoring.subjects import Subjects
from services.runtime import telemetry
from services.runtime.queue import GONE

_LOOK_EVERY_S = 1.0


class Observing:
    """Takes in events."""

    def __init__(self, halves: Halves, reports: Reports, subjects: Subjects) -> None:
        self._halves = halves
        self._reports = reports
        self._subjects = subjects

    async def take(self, model_name: str, event: CloudEvent) -> None:
        """Keep an event until the other half comes, or store what both are; nothing is lost once this returns."""
        subject = await self._subjects.of(model_name)
        half, batch = await asyncio.to_thread(half_of, event, subject.model)
        pair = await self._halves.put(subject.model.name, event.id, half, batch)
        if pair and pair.whole:
            await self._store(pair)

    async def run(self) -> None:
        """Give up what waited for too long, or is too much, until the task is cancelled."""
        while True:
            try:
                await self.look()
            except (DefuseError, *GONE) as error:
                telemetry.log().warning("events_wait", error=str(error), retry_s=_LOOK_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Give up halves without the other; store pairs whose gateway died before it could."""
        for pair in await self._halves.late():
            await self._end(pair, f"no_{pair.lacks}")
        for pair in await self._halves.too_many():
            await self._end(pair, "too_many_waiting")

    async def _end(self, pair: Pair, reason: str) -> None:
        if pair.whole:
            await self._store(pair)
        else:
            await self._give_up(pair, reason)

    async def _store(self, pair: Pair) -> None:
        """Store a whole pair and let go of it: killed in between, it is stored again, which changes nothing."""
        subject = await self._subjects.of(pair.model)
        try:
            observations = joined(pair.halves[REQUEST], pair.halves[RESPONSE])
        except InvalidInput:
            await self._give_up(pair, "halves_differ")
            raise
        with suppress(
            Conflict
        ):  # another gateway has the same pair in its hands; should that one die, it is found again
            await self._reports.store(subject, Batch(id=pair.key.rpartition(":")[2], observations=observations))
            await self._halves.settle(pair)

    async def _give_up(self, pair: Pair, reason: str) -> None:
        rows = max((len(half.observations) for half in pair.halves.values()), default=0)
        if await self._halves.settle(pair):
            telemetry.OBSERVATIONS.labels(pair.model, reason).inc(rows)
            telemetry.log().warning("event_given_up", model=pair.model, reason=reason, observations=rows)
