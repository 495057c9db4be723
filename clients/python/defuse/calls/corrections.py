"""Corrections: started, followed, cancelled, released."""

from collections.abc import Callable
from typing import Any

from defuse import names
from defuse.calls.models import GATE_DEADLINE_S
from defuse.calls.pages import listed
from defuse.calls.requests import new_id, persistently
from defuse.correction_settings import CorrectionSettings, correction_config
from defuse.steps import Call, Steps, Stream, User
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Correction, Release


def create_correction(run_id: str, **settings: Any) -> Steps[Correction]:
    """Start a correction with the labelled regions of a run. `settings` are those of `CorrectionSettings`."""
    config = yield from correction_config(CorrectionSettings(**settings))
    request = pb.CreateCorrectionRequest(run=names.run(run_id), config=config, request_id=new_id())
    answer = yield Call(method="CreateCorrection", request=request)
    return Correction.from_proto(answer.correction)


def correction(run_id: str, correction_id: str) -> Steps[Correction]:
    """Return a correction."""
    request = pb.GetCorrectionRequest(name=names.correction(run_id, correction_id))
    answer = yield Call(method="GetCorrection", request=request)
    return Correction.from_proto(answer.correction)


def corrections(run_id: str) -> Steps[list[Correction]]:
    """Return the corrections of a run, oldest first."""
    found = yield from listed("ListCorrections", pb.ListCorrectionsRequest(run=names.run(run_id)), "corrections")
    return [Correction.from_proto(message) for message in found]


def wait_for_correction(
    run_id: str,
    correction_id: str,
    *,
    timeout_s: float | None = None,
    on_change: Callable[[Correction], None] = lambda _: None,
) -> Steps[Correction]:
    """Wait until a correction has ended and return it; raise DeadlineExceeded after `timeout_s` seconds."""
    yield Stream(
        method="WatchCorrection",
        request=pb.WatchCorrectionRequest(name=names.correction(run_id, correction_id)),
        read=lambda answer: on_change(Correction.from_proto(answer.correction)),
        timeout_s=timeout_s,
    )
    return (yield from correction(run_id, correction_id))


def cancel_correction(run_id: str, correction_id: str) -> Steps[Correction]:
    """Stop a correction."""
    request = pb.CancelCorrectionRequest(name=names.correction(run_id, correction_id))
    answer = yield Call(method="CancelCorrection", request=request)
    return Correction.from_proto(answer.correction)


def release(
    run_id: str, correction_id: str, *, reason: str = "", actor: str | None = None, approver: str = ""
) -> Steps[Release]:
    """Publish a correction as a new version of its model.

    Raises NotReady where it does not pass the gate, unless an `approver` with a `reason` lets it through; they and
    `actor`, by default the user, are kept. Waits on when the connection is lost: the release goes on meanwhile.
    """
    request = pb.ReleaseCorrectionRequest(
        name=names.correction(run_id, correction_id),
        actor=actor or (yield User()),
        reason=reason,
        approver=approver,
        request_id=new_id(),
    )
    yield from correction(run_id, correction_id)  # where there is no gateway, that is said at once
    call = Call(method="ReleaseCorrection", request=request, timeout_s=GATE_DEADLINE_S)
    answer = yield from persistently(call, GATE_DEADLINE_S)
    return Release.from_proto(answer.release)
