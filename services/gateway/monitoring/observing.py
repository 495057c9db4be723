"""Events of inference that become observations: request and answer come separately, in either order.

Senders are not kept waiting for the store: what lies in Redis is not lost, and whole pairs are stored from there, as
many at once as there are.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence

from defuse.errors import DefuseError, InvalidInput, NotFound
from defuse.v1 import model_pb2, monitor_pb2

from services.gateway.monitoring.cloud_events import CloudEvent
from services.gateway.monitoring.halves import Halves, Pair
from services.gateway.monitoring.payloads import REQUEST, RESPONSE, half_of, joined
from services.gateway.monitoring.receiving import Batch, check
from services.gateway.monitoring.reports import Reports
from services.gateway.monitoring.subjects import Subjects
from services.runtime import telemetry
from services.runtime.queue import GONE

_STORE_EVERY_S = 0.2
_LOOK_EVERY_S = 1.0


class Observing:
    """Takes in events."""

    def __init__(self, halves: Halves, reports: Reports, subjects: Subjects) -> None:
        self._halves = halves
        self._reports = reports
        self._subjects = subjects

    @property
    def loops(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """What runs as long as the gateway."""
        return [
            lambda: _again_and_again(self.store_whole, _STORE_EVERY_S),
            lambda: _again_and_again(self.look, _LOOK_EVERY_S),
        ]

    async def take(self, model_name: str, event: CloudEvent) -> None:
        """Keep an event until it is stored with its other half; it is not lost once this returns.

        Raises InvalidInput for one that could never be stored: whoever sent it is not there any more when it is.
        """
        subject = await self._subjects.of(model_name)
        half, batch = await asyncio.to_thread(half_of, event, subject.model)
        await asyncio.to_thread(check, batch.observations, subject.model)
        await self._halves.put(subject.model.name, event.id, half, batch)

    async def store_whole(self) -> None:
        """Store all pairs that are whole."""
        while pairs := await self._halves.take_whole():
            try:
                await self._store(pairs)
            except BaseException:
                await self._halves.give_back(pairs)
                raise

    async def look(self) -> None:
        """Give up what waits for too long, or is too much; take up pairs whose gateway died before it stored them."""
        late, beyond = await self._halves.late(), await self._halves.too_many()
        await self._halves.give_back([pair for pair in (*late, *beyond) if pair.whole])
        for pair in late:
            if not pair.whole:
                await self._give_up(pair, f"no_{pair.lacks}")
        for pair in beyond:
            if not pair.whole:
                await self._give_up(pair, "too_many_waiting")

    async def _store(self, pairs: Sequence[Pair]) -> None:
        """Store pairs and let go of them: killed in between, they are stored again, which changes nothing."""
        found: dict[str, list[Pair]] = {}
        for pair in pairs:
            found.setdefault(pair.model, []).append(pair)
        for model_name, of_model in found.items():
            try:
                await self._store_of(model_name, of_model)
            except (NotFound, InvalidInput) as error:  # the model is gone, or another one, since they came
                for pair in of_model:
                    await self._give_up(pair, "model_changed", error=error.message)

    async def _store_of(self, model_name: str, pairs: Sequence[Pair]) -> None:
        subject = await self._subjects.of(model_name)
        observations: list[monitor_pb2.Observation] = []
        for pair in pairs:
            observations += await self._observations(pair, subject.model)
        await self._reports.store(subject, Batch(id=uuid.uuid4().hex, observations=observations))
        for pair in pairs:
            await self._halves.settle(pair)

    async def _observations(self, pair: Pair, model: model_pb2.Model) -> Sequence[monitor_pb2.Observation]:
        """Return what is to be stored of a pair: nothing where it is given up, lest others be refused for it."""
        reason = "halves_differ"
        try:
            found = joined(pair.halves[REQUEST], pair.halves[RESPONSE])
            reason = "model_changed"
            await asyncio.to_thread(check, found, model)
        except InvalidInput as error:
            await self._give_up(pair, reason, error=error.message)
            return []
        return found

    async def _give_up(self, pair: Pair, reason: str, **why: str) -> None:
        rows = max((len(half.observations) for half in pair.halves.values()), default=0)
        if await self._halves.settle(pair):
            telemetry.OBSERVATIONS.labels(pair.model, reason).inc(rows)
            telemetry.log().warning("event_given_up", model=pair.model, reason=reason, observations=rows, **why)


async def _again_and_again(call: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Call until the task is cancelled, whatever is away meanwhile."""
    while True:
        try:
            await call()
        except (DefuseError, OSError, *GONE) as error:
            telemetry.log().warning("events_wait", error=str(error))
            await asyncio.sleep(_LOOK_EVERY_S)
        await asyncio.sleep(pause_s)
