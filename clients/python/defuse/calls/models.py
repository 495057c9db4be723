"""Calls for models and guards."""

from collections.abc import Sequence
from pathlib import Path

from defuse import names
from defuse.calls.sans_io import Rpc, SansIoCall, list_all_pages, new_request_id
from defuse.calls.uploads import read_content, upload_bytes
from defuse.errors import InvalidInput
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import model_pb2
from defuse.values import Guard, Model, Preprocessing

# Triton loads the model before the response.
_LOAD_DEADLINE_S = 150.0
# The corrector decodes and encodes some thousand images, and Triton loads two models.
_GUARD_DEADLINE_S = 300.0


def version() -> SansIoCall[str]:
    """Return the version of the gateway."""
    response = yield Rpc(method="GetVersion", request=pb.GetVersionRequest())
    return str(response.version)


def add_model(
    model_id: str,
    onnx: str | Path | bytes,
    classes: Sequence[str],
    preprocessing: Preprocessing | None = None,
    *,
    output: str = "logits",
) -> SansIoCall[Model]:
    """Register a classifier and serve it as version 1.

    Args:
        model_id: Id of the model, also its name in Triton.
        onnx: The classifier: the path of an ONNX file, or its content.
        classes: Class names in the order of the outputs.
        preprocessing: The map from stored pixels to the classifier's input.
        output: `logits` or `probabilities`.
    """
    if output not in {"logits", "probabilities"}:
        raise InvalidInput(f"output {output!r} is unknown; use logits or probabilities")
    content = yield from read_content(onnx)
    model_ = model_pb2.Model(
        name=names.model(model_id),
        classes=classes,
        preprocessing=(preprocessing or Preprocessing()).to_proto(),
        output=model_pb2.Model.Output.Value(f"OUTPUT_{output.upper()}"),
    )
    digest = yield from upload_bytes(content)
    request = pb.CreateModelRequest(model=model_, file_digest=digest, request_id=new_request_id())
    response = yield Rpc(method="CreateModel", request=request, timeout_s=_LOAD_DEADLINE_S)
    return Model.from_proto(response.model)


def model(model_id: str) -> SansIoCall[Model]:
    """Return a model."""
    response = yield Rpc(method="GetModel", request=pb.GetModelRequest(name=names.model(model_id)))
    return Model.from_proto(response.model)


def models() -> SansIoCall[list[Model]]:
    """Return all models, by id."""
    messages = yield from list_all_pages("ListModels", pb.ListModelsRequest(), "models")
    return [Model.from_proto(message) for message in messages]


def create_guard(run_id: str, *, false_alarm_rate: float = 0.0) -> SansIoCall[Guard]:
    """Make a guard from the labelled regions of a run.

    Triton serves it beside the model. Every release makes a guard as well. `false_alarm_rate` bounds the share of
    correctly classified images that the guard puts inside a region; 0 takes the default of 0.05.
    """
    request = pb.CreateGuardRequest(
        run=names.run(run_id), false_alarm_rate=false_alarm_rate, request_id=new_request_id()
    )
    response = yield Rpc(method="CreateGuard", request=request, timeout_s=_GUARD_DEADLINE_S)
    return Guard.from_proto(response.guard)


def guard(model_id: str, guard_id: str) -> SansIoCall[Guard]:
    """Return a guard."""
    response = yield Rpc(method="GetGuard", request=pb.GetGuardRequest(name=names.guard(model_id, guard_id)))
    return Guard.from_proto(response.guard)


def guards(model_id: str) -> SansIoCall[list[Guard]]:
    """Return the guards of a model, oldest first; Triton serves the last."""
    messages = yield from list_all_pages("ListGuards", pb.ListGuardsRequest(model=names.model(model_id)), "guards")
    return [Guard.from_proto(message) for message in messages]
