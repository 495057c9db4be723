"""Runs: started, followed, cancelled; their failures as they are found."""

from collections.abc import Callable
from typing import Any

from defuse import names
from defuse.calls.pages import listed
from defuse.calls.requests import new_id
from defuse.run_settings import RunSettings, run_config
from defuse.steps import Call, Steps, Stream
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import generator_service_pb2
from defuse.values import CostEstimate, FailureBatch, Run, ValidityAdvice

_ESTIMATE_DEADLINE_S = 120.0


def create_run(run_id: str, *, model: str, dataset: str, **settings: Any) -> Steps[Run]:
    """Start a run. `settings` are those of `RunSettings`: what differs from the defaults."""
    config = yield from run_config(RunSettings(model=model, dataset=dataset, **settings))
    request = pb.CreateRunRequest(run_id=run_id, config=config, request_id=new_id())
    answer = yield Call(method="CreateRun", request=request)
    return Run.from_proto(answer.run)


def estimate_run(*, model: str, dataset: str, **settings: Any) -> Steps[CostEstimate]:
    """Say what a run with these settings would cost, without starting it; takes a few seconds."""
    config = yield from run_config(RunSettings(model=model, dataset=dataset, **settings))
    request = pb.EstimateRunRequest(config=config)
    answer = yield Call(method="EstimateRun", request=request, timeout_s=_ESTIMATE_DEADLINE_S)
    return CostEstimate.from_proto(answer.estimate)


def run(run_id: str) -> Steps[Run]:
    """Return a run."""
    answer = yield Call(method="GetRun", request=pb.GetRunRequest(name=names.run(run_id)))
    return Run.from_proto(answer.run)


def runs() -> Steps[list[Run]]:
    """Return all runs, newest first."""
    found = yield from listed("ListRuns", pb.ListRunsRequest(), "runs")
    return [Run.from_proto(message) for message in found]


def watch_run(run_id: str, *, timeout_s: float | None = None) -> Stream[Run]:
    """Yield a run now and whenever it changes, until it has ended; lost connections are made again.

    Raises DeadlineExceeded after `timeout_s` seconds; the run goes on.
    """
    return Stream(
        method="WatchRun",
        request=pb.WatchRunRequest(name=names.run(run_id)),
        read=lambda answer: Run.from_proto(answer.run),
        timeout_s=timeout_s,
    )


def wait_for_run(
    run_id: str, *, timeout_s: float | None = None, on_change: Callable[[Run], None] = lambda _: None
) -> Steps[Run]:
    """Wait until a run has ended and return it; raise DeadlineExceeded after `timeout_s` seconds."""

    def changed(answer: pb.WatchRunResponse) -> Run:
        now = Run.from_proto(answer.run)
        on_change(now)
        return now

    request = pb.WatchRunRequest(name=names.run(run_id))
    last = yield Stream(method="WatchRun", request=request, read=changed, timeout_s=timeout_s)
    return last or (yield from run(run_id))


def cancel_run(run_id: str) -> Steps[Run]:
    """Stop a run."""
    answer = yield Call(method="CancelRun", request=pb.CancelRunRequest(name=names.run(run_id)))
    return Run.from_proto(answer.run)


def failures(run_id: str, *, resume_token: str = "", cancel_run: bool = False) -> Stream[FailureBatch]:
    """Yield a run's failures as they are found, until its search has ended; a slow reader is waited for.

    Lost connections are made again where they broke off; `resume_token` of a batch does the same in another
    process. With `cancel_run` the run is cancelled when the iterator is closed before its end.
    """
    request = generator_service_pb2.IdentifyRequest(run=names.run(run_id), resume_token=resume_token)

    def read(answer: generator_service_pb2.IdentifyResponse) -> FailureBatch:
        request.resume_token = answer.resume_token
        return FailureBatch.from_proto(answer)

    # Said by a call of its own: a connection that is lost must not cancel anything.
    abandoned = (lambda: _cancelled(run_id)) if cancel_run else None
    return Stream(method="Identify", request=request, read=read, abandoned=abandoned)


def advise_validity(run_id: str) -> Steps[ValidityAdvice]:
    """Say which validity thresholds would have kept the regions out that people called invalid.

    `validity_from` of a new run takes them. Raises NotReady unless a region is invalid and another one labelled.
    """
    answer = yield Call(method="AdviseValidity", request=pb.AdviseValidityRequest(run=names.run(run_id)))
    return ValidityAdvice.from_proto(answer.advice)


_cancelled = cancel_run  # where a parameter has its name
