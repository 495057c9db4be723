"""Guards: which known region a live image falls in."""

from defuse import names
from defuse.calls.pages import listed
from defuse.calls.requests import new_id
from defuse.steps import Call, Steps
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Guard

# Some thousand images are decoded and encoded, and two models loaded.
_DEADLINE_S = 300.0


def create_guard(run_id: str, *, false_alarm_rate: float = 0.0) -> Steps[Guard]:
    """Have a guard made of the labelled regions of a run and served beside the model; each release makes one, too.

    `false_alarm_rate` is the share of images without a failure that may be said to be inside a region; 0 is 0.05.
    """
    request = pb.CreateGuardRequest(run=names.run(run_id), false_alarm_rate=false_alarm_rate, request_id=new_id())
    answer = yield Call(method="CreateGuard", request=request, timeout_s=_DEADLINE_S)
    return Guard.from_proto(answer.guard)


def guard(model_id: str, guard_id: str) -> Steps[Guard]:
    """Return a guard."""
    answer = yield Call(method="GetGuard", request=pb.GetGuardRequest(name=names.guard(model_id, guard_id)))
    return Guard.from_proto(answer.guard)


def guards(model_id: str) -> Steps[list[Guard]]:
    """Return the guards of a model, oldest first; the last one is served."""
    found = yield from listed("ListGuards", pb.ListGuardsRequest(model=names.model(model_id)), "guards")
    return [Guard.from_proto(message) for message in found]
