"""Trials of candidates on live requests."""

from defuse import names
from defuse.calls.models import GATE_DEADLINE_S
from defuse.calls.pages import listed
from defuse.calls.requests import new_id
from defuse.errors import InvalidInput
from defuse.steps import Call, Steps, User
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import trial_pb2
from defuse.values import Trial


def start_trial(
    run_id: str,
    correction_id: str,
    *,
    mode: str = "canary",
    share: float = 0.1,
    reason: str = "",
    actor: str | None = None,
    approver: str = "",
) -> Steps[Trial]:
    """Try a correction's candidate on a share of the requests that the gateway answers.

    `canary`: it answers them; where it fails, the version that callers get does. `shadow`: it is asked beside that
    version, and answers are compared. Raises NotReady for a canary that does not pass the gate, unless an
    `approver` with a `reason` lets it through.
    """
    if mode not in {"canary", "shadow"}:
        raise InvalidInput(f"mode {mode!r} is unknown; use canary or shadow")
    wanted = trial_pb2.Trial(
        correction=names.correction(run_id, correction_id),
        mode=trial_pb2.Trial.Mode.Value(f"MODE_{mode.upper()}"),
        share=share,
        actor=actor or (yield User()),
        reason=reason,
        approver=approver,
    )
    request = pb.StartTrialRequest(trial=wanted, request_id=new_id())
    answer = yield Call(method="StartTrial", request=request, timeout_s=GATE_DEADLINE_S)
    return Trial.from_proto(answer.trial)


def trials(model_id: str) -> Steps[list[Trial]]:
    """Return the trials of a model, oldest first."""
    found = yield from listed("ListTrials", pb.ListTrialsRequest(model=names.model(model_id)), "trials")
    return [Trial.from_proto(message) for message in found]


def trial(model_id: str, trial_id: str) -> Steps[Trial]:
    """Return a trial with what was seen so far."""
    answer = yield Call(method="GetTrial", request=pb.GetTrialRequest(name=names.trial(model_id, trial_id)))
    return Trial.from_proto(answer.trial)


def stop_trial(model_id: str, trial_id: str) -> Steps[Trial]:
    """End a trial; when this returns, the candidate answers no caller any more."""
    answer = yield Call(method="StopTrial", request=pb.StopTrialRequest(name=names.trial(model_id, trial_id)))
    return Trial.from_proto(answer.trial)
