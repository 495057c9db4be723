"""Calls for runs and long-running operations, and the settings of a run."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.longrunning import operations_proto_pb2

from defuse import names
from defuse.calls.sans_io import (
    Rpc,
    SansIoCall,
    Sleep,
    StreamRpc,
    build_message,
    list_all_pages,
    new_request_id,
)
from defuse.calls.uploads import read_content, upload_bytes
from defuse.errors import DeadlineExceeded, Unavailable
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import generator_service_pb2, run_pb2
from defuse.values import CostEstimate, FailureBatch, OperationStatus, Run, ValidityAdvice

Section = Mapping[str, Any]
_ESTIMATE_DEADLINE_S = 120.0
# Seconds that one WaitOperation call waits before the progress is reported.
_WAIT_TURN_S = 2.0
_WAIT_RESPONSE_S = 10.0
_RECONNECT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run.

    Each section has deviations from the defaults, by field name of the contract.

    search: radius_sd, draws_per_source, rendering ("auto", "decoder" or "residual"),
        strategy ("adaptive" or "uniform"), noise ("gaussian" or "released"), ...
    vae: latent_dim, epochs, beta, max_side, seed; or `encoder` and `decoder`, the paths
        of two ONNX files.
    validity: label_model ("auto", "latent" or "image"), min_label_probability,
        min_neighbour_agreement, min_typicality, max_radius_sd, max_round_trip_sd, and
        `oracle`, the id of a second, stronger model.
    preflight: declared_accuracy, max_reconstruction_loss.
    mixture: kind ("error_aware" or "plain"), max_components, min_support,
        fresh_decodes, false_discovery_rate, bootstraps.
    validity_from: id of a run whose annotations advise the thresholds that `validity`
        leaves out.
    """

    model: str
    dataset: str
    model_version: int = 0
    seed: int = 0
    search: Section = field(default_factory=dict)
    vae: Section = field(default_factory=dict)
    validity: Section = field(default_factory=dict)
    preflight: Section = field(default_factory=dict)
    mixture: Section = field(default_factory=dict)
    validity_from: str = ""


def run_config(settings: RunSettings) -> SansIoCall[run_pb2.RunConfig]:
    """Return the message of the settings, and upload the named files."""
    vae = dict(settings.vae)
    for part in ("encoder", "decoder"):
        if path := vae.pop(part, None):
            vae[f"{part}_digest"] = yield from upload_bytes((yield from read_content(path)))
    validity = _with_enum_names(settings.validity, "label_model")
    if oracle := validity.get("oracle"):
        validity["oracle"] = names.model(oracle)
    return run_pb2.RunConfig(
        model=names.model(settings.model),
        model_version=settings.model_version,
        dataset=names.dataset(settings.dataset),
        seed=settings.seed,
        search=build_message(run_pb2.SearchConfig, _with_enum_names(settings.search, "strategy", "noise", "rendering")),
        vae=build_message(run_pb2.VaeConfig, vae),
        validity=build_message(run_pb2.ValidityConfig, validity),
        preflight=build_message(run_pb2.PreflightConfig, settings.preflight),
        mixture=build_message(run_pb2.MixtureConfig, _with_enum_names(settings.mixture, "kind")),
        validity_from=names.run(settings.validity_from) if settings.validity_from else "",
    )


def _with_enum_names(section: Section, *enums: str) -> dict[str, Any]:
    """Return the section with the contract's enum names.

    `uniform` becomes `STRATEGY_UNIFORM`, for example.
    """
    values = {name: section[name] for name in enums if section.get(name)}
    return {**section, **{name: f"{name.upper()}_{value.upper()}" for name, value in values.items()}}


def create_run(run_id: str, *, model: str, dataset: str, **settings: Any) -> SansIoCall[Run]:
    """Start a run.

    `settings` are the other fields of `defuse.calls.runs.RunSettings`.
    """
    config = yield from run_config(RunSettings(model=model, dataset=dataset, **settings))
    request = pb.CreateRunRequest(run_id=run_id, config=config, request_id=new_request_id())
    response = yield Rpc(method="CreateRun", request=request)
    return Run.from_proto(response.run)


def estimate_run(*, model: str, dataset: str, **settings: Any) -> SansIoCall[CostEstimate]:
    """Estimate the cost of a run without starting it.

    The estimate takes a few seconds. `settings` are those of `create_run`.
    """
    config = yield from run_config(RunSettings(model=model, dataset=dataset, **settings))
    request = pb.EstimateRunRequest(config=config)
    response = yield Rpc(method="EstimateRun", request=request, timeout_s=_ESTIMATE_DEADLINE_S)
    return CostEstimate.from_proto(response.estimate)


def run(run_id: str) -> SansIoCall[Run]:
    """Return a run."""
    response = yield Rpc(method="GetRun", request=pb.GetRunRequest(name=names.run(run_id)))
    return Run.from_proto(response.run)


def runs() -> SansIoCall[list[Run]]:
    """Return all runs, newest first."""
    messages = yield from list_all_pages("ListRuns", pb.ListRunsRequest(), "runs")
    return [Run.from_proto(message) for message in messages]


def watch_run(run_id: str, *, timeout_s: float | None = None) -> StreamRpc[Run]:
    """Yield a run now and after every change until its end.

    The stream reconnects after connection losses. Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
    """
    return StreamRpc(
        method="WatchRun",
        request=pb.WatchRunRequest(name=names.run(run_id)),
        parse=lambda response: Run.from_proto(response.run),
        timeout_s=timeout_s,
    )


def wait_for_run(
    run_id: str, *, timeout_s: float | None = None, on_change: Callable[[Run], None] = lambda _: None
) -> SansIoCall[Run]:
    """Wait for the end of a run and return it.

    Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
    """

    def parse(response: pb.WatchRunResponse) -> Run:
        changed = Run.from_proto(response.run)
        on_change(changed)
        return changed

    request = pb.WatchRunRequest(name=names.run(run_id))
    last = yield StreamRpc(method="WatchRun", request=request, parse=parse, timeout_s=timeout_s)
    return last or (yield from run(run_id))


def cancel_run(run_id: str) -> SansIoCall[Run]:
    """Cancel a run."""
    response = yield Rpc(method="CancelRun", request=pb.CancelRunRequest(name=names.run(run_id)))
    return Run.from_proto(response.run)


def failures(run_id: str, *, resume_token: str = "", cancel_run: bool = False) -> StreamRpc[FailureBatch]:
    """Yield batches of failures while the search finds them.

    A slow reader slows the stream down, but loses nothing. Lost connections resume where they broke, and the
    `resume_token` of a batch does the same in another process. With `cancel_run`, closing the iterator before its end
    cancels the run.
    """
    request = generator_service_pb2.IdentifyRequest(run=names.run(run_id), resume_token=resume_token)

    def parse(response: generator_service_pb2.IdentifyResponse) -> FailureBatch:
        request.resume_token = response.resume_token
        return FailureBatch.from_proto(response)

    # A separate call cancels the run: a lost connection must not.
    on_early_close = (lambda: _cancel_run(run_id)) if cancel_run else None
    return StreamRpc(method="Identify", request=request, parse=parse, on_early_close=on_early_close)


_cancel_run = cancel_run  # a parameter of `failures` hides the name


def advise_validity(run_id: str) -> SansIoCall[ValidityAdvice]:
    """Return validity thresholds that would have excluded the invalid regions.

    These are the regions annotated as invalid. `validity_from` of a new run applies the thresholds. Raises NotReady
    without an invalid and a labelled region.
    """
    response = yield Rpc(method="AdviseValidity", request=pb.AdviseValidityRequest(run=names.run(run_id)))
    return ValidityAdvice.from_proto(response.advice)


def operation(name: str) -> SansIoCall[OperationStatus]:
    """Return the status of an operation."""
    response = yield Rpc(method="GetOperation", request=operations_proto_pb2.GetOperationRequest(name=name))
    return OperationStatus.from_proto(response)


def operations(run_id: str = "", *, model: str = "", done: bool | None = None) -> SansIoCall[list[OperationStatus]]:
    """Return operations of a run, a model or all runs, newest first.

    The operations of a run are its search and its corrections, and those of a model its releases. `done` selects
    finished or unfinished operations; None returns both.
    """
    filter_ = "" if done is None else f"done={str(done).lower()}"
    parent = names.model(model) if model else names.run(run_id) if run_id else ""
    request = operations_proto_pb2.ListOperationsRequest(name=parent, filter=filter_)
    messages = yield from list_all_pages("ListOperations", request, "operations")
    return [OperationStatus.from_proto(message) for message in messages]


def wait_for_operation(
    name: str, *, timeout_s: float | None = None, on_progress: Callable[[OperationStatus], None] = lambda _: None
) -> SansIoCall[OperationStatus]:
    """Wait for the end of an operation and return its status.

    The call reconnects after connection losses. Raises DeadlineExceeded after `timeout_s` seconds; the operation
    continues.
    """
    end = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        turn_s = max(0.0, min(_WAIT_TURN_S, end - time.monotonic()))
        request = operations_proto_pb2.WaitOperationRequest(name=name)
        request.timeout.FromNanoseconds(round(turn_s * 1e9))
        try:
            response = yield Rpc(method="WaitOperation", request=request, timeout_s=turn_s + _WAIT_RESPONSE_S)
        except Unavailable:
            if time.monotonic() >= end:
                raise
            yield Sleep(seconds=min(_RECONNECT_S, max(0.0, end - time.monotonic())))
            continue
        status = OperationStatus.from_proto(response)
        on_progress(status)
        if status.ended:
            return status
        if time.monotonic() >= end:
            raise DeadlineExceeded(
                f"{name} had not ended after {timeout_s:g} s; it goes on: call again, or wait longer"
            )


def cancel_operation(name: str) -> SansIoCall[None]:
    """Cancel an operation; a finished one stays as it is."""
    yield Rpc(method="CancelOperation", request=operations_proto_pb2.CancelOperationRequest(name=name))


def delete_operation(name: str) -> SansIoCall[None]:
    """Delete a finished operation, but not its result.

    Raises NotReady for an unfinished operation.
    """
    yield Rpc(method="DeleteOperation", request=operations_proto_pb2.DeleteOperationRequest(name=name))
