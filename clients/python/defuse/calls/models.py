"""Models, what the gate says of candidates, and which version callers get."""

from collections.abc import Sequence
from pathlib import Path

from defuse import names
from defuse.calls.pages import listed
from defuse.calls.requests import new_id
from defuse.errors import InvalidInput
from defuse.steps import Call, Steps, User
from defuse.uploads import content_of, upload_bytes
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import model_pb2
from defuse.values import GateVerdict, Model, Preprocessing, Release

# Registering and releasing load a model in Triton.
_LOAD_DEADLINE_S = 150.0
# The gate asks two versions about all test images.
GATE_DEADLINE_S = 900.0


def version() -> Steps[str]:
    """Return the version of the system that answers."""
    answer = yield Call(method="GetVersion", request=pb.GetVersionRequest())
    return str(answer.version)


def add_model(
    model_id: str,
    onnx: str | Path | bytes,
    classes: Sequence[str],
    preprocessing: Preprocessing | None = None,
    *,
    output: str = "logits",
) -> Steps[Model]:
    """Register a classifier and serve it as version 1; `output` is `logits` or `probabilities`."""
    if output not in {"logits", "probabilities"}:
        raise InvalidInput(f"output {output!r} is unknown; use logits or probabilities")
    file = yield from content_of(onnx)
    model_ = model_pb2.Model(
        name=names.model(model_id),
        classes=classes,
        preprocessing=(preprocessing or Preprocessing()).to_proto(),
        output=model_pb2.Model.Output.Value(f"OUTPUT_{output.upper()}"),
    )
    request = pb.CreateModelRequest(model=model_, file_digest=(yield from upload_bytes(file)), request_id=new_id())
    answer = yield Call(method="CreateModel", request=request, timeout_s=_LOAD_DEADLINE_S)
    return Model.from_proto(answer.model)


def model(model_id: str) -> Steps[Model]:
    """Return a model."""
    answer = yield Call(method="GetModel", request=pb.GetModelRequest(name=names.model(model_id)))
    return Model.from_proto(answer.model)


def models() -> Steps[list[Model]]:
    """Return all models, by id."""
    found = yield from listed("ListModels", pb.ListModelsRequest(), "models")
    return [Model.from_proto(message) for message in found]


def releases(model_id: str) -> Steps[list[Release]]:
    """Return the releases of a model, oldest first."""
    found = yield from listed("ListReleases", pb.ListReleasesRequest(model=names.model(model_id)), "releases")
    return [Release.from_proto(message) for message in found]


def judge(model_id: str, onnx: str | Path | bytes, *, dataset: str = "") -> Steps[GateVerdict]:
    """Ask the gate whether a file may take the place of the version that callers of a model get.

    `dataset` is the id of the data set whose test split is asked about, by default that of the model's newest run.
    A broken file is a verdict that is not passed.
    """
    file = yield from content_of(onnx)
    request = pb.JudgeCandidateRequest(
        model=names.model(model_id),
        file_digest=(yield from upload_bytes(file)),
        dataset=names.dataset(dataset) if dataset else "",
    )
    answer = yield Call(method="JudgeCandidate", request=request, timeout_s=GATE_DEADLINE_S)
    return GateVerdict.from_proto(answer.verdict)


def verdict(model_id: str, verdict_id: str) -> Steps[GateVerdict]:
    """Return what the gate said."""
    request = pb.GetVerdictRequest(name=names.verdict(model_id, verdict_id))
    answer = yield Call(method="GetVerdict", request=request)
    return GateVerdict.from_proto(answer.verdict)


def rollback(model_id: str, *, reason: str = "", actor: str | None = None) -> Steps[Release]:
    """Give callers the version before the present one; `actor`, by default the user, and `reason` are kept."""
    request = pb.RollbackModelRequest(
        model=names.model(model_id), actor=actor or (yield User()), reason=reason, request_id=new_id()
    )
    answer = yield Call(method="RollbackModel", request=request, timeout_s=_LOAD_DEADLINE_S)
    return Release.from_proto(answer.release)
