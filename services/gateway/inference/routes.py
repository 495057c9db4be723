"""Who answers a request: the version that callers get, or the challenger of a trial under way."""

import asyncio
import random
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from defuse import names
from defuse.errors import NotFound
from defuse.v1 import trial_pb2

from services.gateway.inference.wire import Target, read_target, retargeted
from services.gateway.trials import LEASE_S, REFRESH_S, Trials
from services.runtime.worker import patiently

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a request goes. Without a version Triton gives the champion: the newest version that is loaded."""

    model: str
    version: str = ""
    # The trial that the request counts in, and whether it was drawn for it.
    trial: trial_pb2.Trial | None = None
    drawn: bool = False


class Routes:
    """What this gateway knows of trials under way. One writer of them all: `Trials`."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._running: dict[str, trial_pb2.Trial] = {}
        self._known_at = 0.0

    async def run(self) -> None:
        """Keep up with all gateways, for ever."""
        while True:
            asked = time.monotonic()
            self.show(await patiently(self._trials.running), since=asked)
            await asyncio.sleep(REFRESH_S)

    def show(self, running: Iterable[trial_pb2.Trial], *, since: float | None = None) -> None:
        """Take what is under way now, or was at a time."""
        self._known_at = time.monotonic() if since is None else since
        self._running = {names.last(names.parent(trial.name)): trial for trial in running}

    def route(self, target: Target) -> Route:
        """Return where a request for inference goes; raise NotFound as `named` does."""
        trial = self._trial(target.model)
        if target.version or trial is None:
            return self.named(target)
        return Route(model=target.model, trial=trial, drawn=_draw(target.id) < trial.share)

    def request_as_named(self, request: bytes) -> bytes:
        """Return a request with what its model and version mean; raise NotFound as `named` does.

        Its first fields are model and version: so it is with all that ask for inference, or about a model.
        """
        target = read_target(request)
        meant = self.named(target)
        return retargeted(request, target, model=meant.model, version=meant.version)

    def named(self, target: Target) -> Route:
        """Return what a model and a version mean; raise NotFound for the challenger of a model that has no trial."""
        trial = self._trial(target.model)
        if target.version == CHALLENGER:
            if trial is None:
                raise NotFound(
                    f"model {target.model!r} has no challenger: no trial is under way; ask for {CHAMPION!r} or leave "
                    "the version out",
                    reason="NO_CHALLENGER",
                )
            model, version = challenger_of(trial)
            return Route(model=model, version=version)
        return Route(model=target.model, version="" if target.version == CHAMPION else target.version)

    def _trial(self, model_id: str) -> trial_pb2.Trial | None:
        """Return the trial of a model; none where this gateway lost sight of the others, as it may have ended."""
        return self._running.get(model_id) if time.monotonic() - self._known_at < LEASE_S else None


def challenger_of(trial: trial_pb2.Trial) -> tuple[str, str]:
    """Return name and version under which Triton serves the challenger of a trial."""
    return trial.candidate, str(trial.candidate_version)


def _draw(request_id: str) -> float:
    """Return a number in [0, 1): the same for the same id, so that one asked again goes the same way."""
    return zlib.crc32(request_id.encode()) / 2**32 if request_id else random.random()  # noqa: S311  # no secret
