"""Trials of candidates on live requests, counted over all gateways."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from defuse import names
from defuse.errors import DefuseError, InvalidInput, NotFound, NotReady
from defuse.v1 import correction_pb2, trial_pb2

from services.gateway.corrections.corrections import Corrections
from services.gateway.records.paging import Cursor, Page
from services.gateway.records.store import RecordStore, Work
from services.runtime.queue import KEY, Queue
from services.storage import keys
from services.storage.catalog import Catalog

_RUNNING, _ENDED = trial_pb2.Trial.STATE_RUNNING, trial_pb2.Trial.STATE_ENDED
# How soon a gateway learns of a trial that another one started or stopped.
REFRESH_S = 0.2
# Age at which a gateway's view is stale; it then routes nothing to a trial.
LEASE_S = 5 * REFRESH_S
# After this time no gateway routes to a stopped trial, and all counts have been written.
_KNOWN_S = LEASE_S + 2 * REFRESH_S
_INDEX = f"{KEY}trials:running"


# Serves the candidate of a trial, when it passed the gate; returns its name and version in Triton.
Serve = Callable[[trial_pb2.Trial], Awaitable[tuple[str, int]]]


class Trials:
    """Starts, finds, counts and stops trials.

    The store has their records at begin and end; Redis has their state in between.
    """

    def __init__(self, queue: Queue, catalog_: Catalog, corrections: Corrections, serve: Serve) -> None:
        self._redis = queue.redis
        self._catalog = catalog_
        self._corrections = corrections
        self._serve = serve
        self._records: RecordStore[trial_pb2.Trial] = RecordStore(
            queue, trial_pb2.Trial, "trials", lambda trial: trial.state == _ENDED
        )

    async def start(self, wanted: trial_pb2.Trial) -> trial_pb2.Trial:
        """Start a trial of a correction's candidate.

        Raises NotReady when the candidate may not answer callers, Conflict while another trial of the model is under
        way, and InvalidInput for a share outside (0, 1].
        """
        _check(wanted)
        correction = await self._corrections.get(wanted.correction)
        if correction.state != correction_pb2.Correction.STATE_SUCCEEDED:
            raise NotReady(
                f"{correction.name} is not finished, or failed; only one that succeeded has a candidate to try",
                reason="CORRECTION_NOT_FINISHED",
            )
        candidate, version = await self._serve(wanted)
        trial = trial_pb2.Trial(
            name=f"{correction.model}/trials/t{1 + len(await self._records.list(correction.model))}",
            state=_RUNNING,
            candidate=candidate,
            candidate_version=version,
            **{said: getattr(wanted, said) for said in ("correction", "mode", "share", "actor", "reason", "approver")},
        )
        trial.create_time.GetCurrentTime()
        # Indexed first, so that a started trial can always be ended; an index entry without a trial is skipped.
        await self._redis.sadd(_INDEX, trial.name)
        await self._records.create(trial, [], lock_key=_model_key(trial.name))
        try:
            await self._keep(trial)
        except DefuseError:
            await self._records.update(trial.name, _end, unlock_key=_model_key(trial.name))
            raise
        return trial

    async def get(self, name: str) -> trial_pb2.Trial:
        return await self._counted(await self._records.get(names.check(name, "models/*/trials/*", field="name")))

    async def page(self, model_name: str, cursor: Cursor) -> Page[trial_pb2.Trial]:
        """Return one page of the trials of a model, oldest first."""
        model = await asyncio.to_thread(self._catalog.model, model_name)
        page = await cursor.page_of(self._records.iterate_after(model.name, cursor.after))
        return replace(page, entries=[await self._counted(trial) for trial in page.entries])

    async def running(self) -> Sequence[trial_pb2.Trial]:
        """Return the trials under way of all models, without their counts."""
        found = []
        for name in await self._redis.smembers(_INDEX):
            with suppress(NotFound):
                found.append(await self._records.get(name.decode()))
        return [trial for trial in found if trial.state == _RUNNING]

    async def of_model(self, model_name: str) -> trial_pb2.Trial | None:
        """Return the trial of a model that is under way, or None."""
        return next((trial for trial in await self.running() if names.parent(trial.name) == model_name), None)

    async def stop(self, name: str) -> trial_pb2.Trial:
        """End a trial, and return once no request is routed to it.

        A trial that has ended is returned unchanged.
        """
        trial = await self.get(name)
        if trial.state == _ENDED:
            return trial
        await self._redis.srem(_INDEX, name)
        await asyncio.sleep(_KNOWN_S)
        ended = await self._counted(await self._records.update(name, _end, unlock_key=_model_key(name)))
        await self._keep(ended)
        return ended

    async def count(self, name: str, figures: Mapping[str, float]) -> None:
        """Add one gateway's counts to a trial."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for figure, amount in figures.items():
                pipe.hincrbyfloat(_counts_key(name), figure, amount)
            await pipe.execute()

    async def _counted(self, trial: trial_pb2.Trial) -> trial_pb2.Trial:
        found = await self._redis.hgetall(_counts_key(trial.name))
        trial.counts.CopyFrom(_counts({figure.decode(): float(amount) for figure, amount in found.items()}))
        return trial

    async def _keep(self, trial: trial_pb2.Trial) -> None:
        await asyncio.to_thread(self._catalog.store.write_message, keys.trial(trial.name), trial)


def _check(wanted: trial_pb2.Trial) -> None:
    names.check(wanted.correction, "runs/*/corrections/*", field="trial.correction")
    if not wanted.mode:
        raise InvalidInput("the mode is missing; use canary or shadow", reason="BAD_MODE", field="trial.mode")
    if not 0 < wanted.share <= 1:
        raise InvalidInput(
            f"the share is {wanted.share:g}; give the part of the requests to draw, above 0 and at most 1",
            reason="OUT_OF_BOUNDS",
            field="trial.share",
        )


def _end(trial: trial_pb2.Trial) -> Sequence[Work]:
    if trial.state != _ENDED:
        trial.state = _ENDED
        trial.end_time.GetCurrentTime()
    return []


def _counts(found: Mapping[str, float]) -> trial_pb2.TrialCounts:
    """Return a trial's counts, with mean times instead of sums."""

    def mean_ms(who: str) -> float:
        answered = found.get(f"{who}_requests", 0) - found.get(f"{who}_errors", 0)
        return 1000 * found.get(f"{who}_seconds", 0) / answered if answered > 0 else 0.0

    counted = ("champion_requests", "challenger_requests", "challenger_errors", "compared", "agreed", "dropped")
    return trial_pb2.TrialCounts(
        **{figure: round(found.get(figure, 0)) for figure in counted},
        champion_ms=mean_ms("champion"),
        challenger_ms=mean_ms("challenger"),
    )


def _model_key(trial_name: str) -> str:
    return f"{KEY}trial-of:{names.parent(trial_name)}"


def _counts_key(trial_name: str) -> str:
    return f"{KEY}trial-counts:{trial_name}"
