"""Calls for corrections, the gate, releases and trials."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defuse import names
from defuse.calls.sans_io import (
    CurrentUser,
    Rpc,
    SansIoCall,
    StreamRpc,
    build_message,
    list_all_pages,
    new_request_id,
    retry_while_unavailable,
)
from defuse.calls.uploads import read_content, upload_bytes
from defuse.errors import InvalidInput
from defuse.v1 import correction_pb2, trial_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Correction, GateVerdict, Release, Trial

METHODS = tuple(
    name.removeprefix("METHOD_").lower()
    for name in correction_pb2.Training.Method.keys()[1:]  # no dict
)
# The gate evaluates two versions on all test images.
_GATE_DEADLINE_S = 900.0
# Triton loads the previous version before the response.
_LOAD_DEADLINE_S = 150.0


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """The settings of a correction; 0 and empty values take their defaults.

    region_weights: lambdas of the loss
        `(1 - lambda) CE(original) + lambda CE(regions)`, each in [0, 1).
    learning_rates: peak learning rates of Adam.
    methods: "all_weights", "last_layer" and "interpolation"; the baselines "unclustered"
        and "continued".
    epochs: largest number of passes over the training data.
    margin: largest accepted loss of test accuracy, in [0, 1].
    unclustered_failures: failures for the baseline without regions; by default the
        number of regions.
    augmentation: max_shift (share of the side), max_rotation_degrees, horizontal_flip;
        none by default.
    torch_factory: `module:function` that builds the classifier, for ONNX files with
        operators that cannot be trained.
    weights: a safetensors file with the state dict of the factory's module.
    """

    region_weights: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    methods: Sequence[str] = ()
    epochs: int = 0
    seed: int = 0
    margin: float = 0.0
    images_per_region: int = 0
    unclustered_failures: int = 0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    torch_factory: str = ""
    weights: Path | str | None = None


def correction_config(settings: CorrectionSettings) -> SansIoCall[correction_pb2.CorrectionConfig]:
    """Return the message of the settings, and upload the named weights."""
    if unknown := [method for method in settings.methods if method not in METHODS]:
        raise InvalidInput(f"method {unknown[0]!r} is unknown; use some of {', '.join(METHODS)}")
    factory = {"function": settings.torch_factory}
    if settings.weights:
        factory["weights_digest"] = yield from upload_bytes((yield from read_content(settings.weights)))
    return build_message(
        correction_pb2.CorrectionConfig,
        {
            "region_weights": settings.region_weights,
            "learning_rates": settings.learning_rates,
            "methods": [f"METHOD_{method.upper()}" for method in settings.methods],
            "epochs": settings.epochs,
            "seed": settings.seed,
            "margin": settings.margin,
            "images_per_region": settings.images_per_region,
            "unclustered_failures": settings.unclustered_failures,
            "augmentation": build_message(correction_pb2.Augmentation, settings.augmentation),
            "torch_factory": build_message(correction_pb2.TorchFactory, factory),
        },
    )


def create_correction(run_id: str, **settings: Any) -> SansIoCall[Correction]:
    """Start a correction with the labelled regions of a run.

    `settings` are the fields of `defuse.calls.corrections.CorrectionSettings`.
    """
    config = yield from correction_config(CorrectionSettings(**settings))
    request = pb.CreateCorrectionRequest(run=names.run(run_id), config=config, request_id=new_request_id())
    response = yield Rpc(method="CreateCorrection", request=request)
    return Correction.from_proto(response.correction)


def correction(run_id: str, correction_id: str) -> SansIoCall[Correction]:
    """Return a correction."""
    request = pb.GetCorrectionRequest(name=names.correction(run_id, correction_id))
    response = yield Rpc(method="GetCorrection", request=request)
    return Correction.from_proto(response.correction)


def corrections(run_id: str) -> SansIoCall[list[Correction]]:
    """Return the corrections of a run, oldest first."""
    request = pb.ListCorrectionsRequest(run=names.run(run_id))
    messages = yield from list_all_pages("ListCorrections", request, "corrections")
    return [Correction.from_proto(message) for message in messages]


def wait_for_correction(
    run_id: str,
    correction_id: str,
    *,
    timeout_s: float | None = None,
    on_change: Callable[[Correction], None] = lambda _: None,
) -> SansIoCall[Correction]:
    """Wait for the end of a correction and return it.

    Raises DeadlineExceeded after `timeout_s` seconds; the correction continues.
    """
    yield StreamRpc(
        method="WatchCorrection",
        request=pb.WatchCorrectionRequest(name=names.correction(run_id, correction_id)),
        parse=lambda response: on_change(Correction.from_proto(response.correction)),
        timeout_s=timeout_s,
    )
    return (yield from correction(run_id, correction_id))


def cancel_correction(run_id: str, correction_id: str) -> SansIoCall[Correction]:
    """Cancel a correction."""
    request = pb.CancelCorrectionRequest(name=names.correction(run_id, correction_id))
    response = yield Rpc(method="CancelCorrection", request=request)
    return Correction.from_proto(response.correction)


def judge(model_id: str, onnx: str | Path | bytes, *, dataset: str = "") -> SansIoCall[GateVerdict]:
    """Check with the gate whether a file may replace the released version.

    `dataset` is the id of the data set whose test split is evaluated, by default that of the model's newest run. A
    broken file fails the gate.
    """
    content = yield from read_content(onnx)
    request = pb.JudgeCandidateRequest(
        model=names.model(model_id),
        file_digest=(yield from upload_bytes(content)),
        dataset=names.dataset(dataset) if dataset else "",
    )
    response = yield Rpc(method="JudgeCandidate", request=request, timeout_s=_GATE_DEADLINE_S)
    return GateVerdict.from_proto(response.verdict)


def verdict(model_id: str, verdict_id: str) -> SansIoCall[GateVerdict]:
    """Return a verdict of the gate."""
    request = pb.GetVerdictRequest(name=names.verdict(model_id, verdict_id))
    response = yield Rpc(method="GetVerdict", request=request)
    return GateVerdict.from_proto(response.verdict)


def release(
    run_id: str, correction_id: str, *, reason: str = "", actor: str | None = None, approver: str = ""
) -> SansIoCall[Release]:
    """Release the candidate of a correction as a new model version.

    Reason, approver and actor are stored; the actor is the user by default. A release continues during a connection
    loss, and the call waits for it. Raises NotReady for a candidate that fails the gate, unless an `approver` overrides
    it with a `reason`.
    """
    request = pb.ReleaseCorrectionRequest(
        name=names.correction(run_id, correction_id),
        actor=actor or (yield CurrentUser()),
        reason=reason,
        approver=approver,
        request_id=new_request_id(),
    )
    yield from correction(run_id, correction_id)  # fail at once without a gateway; the release itself is retried
    rpc = Rpc(method="ReleaseCorrection", request=request, timeout_s=_GATE_DEADLINE_S)
    response = yield from retry_while_unavailable(rpc, _GATE_DEADLINE_S)
    return Release.from_proto(response.release)


def rollback(model_id: str, *, reason: str = "", actor: str | None = None) -> SansIoCall[Release]:
    """Restore the previous version of a model.

    `reason` and `actor` are stored; the actor is the user by default.
    """
    request = pb.RollbackModelRequest(
        model=names.model(model_id), actor=actor or (yield CurrentUser()), reason=reason, request_id=new_request_id()
    )
    response = yield Rpc(method="RollbackModel", request=request, timeout_s=_LOAD_DEADLINE_S)
    return Release.from_proto(response.release)


def releases(model_id: str) -> SansIoCall[list[Release]]:
    """Return the releases of a model, oldest first."""
    request = pb.ListReleasesRequest(model=names.model(model_id))
    messages = yield from list_all_pages("ListReleases", request, "releases")
    return [Release.from_proto(message) for message in messages]


def start_trial(
    run_id: str,
    correction_id: str,
    *,
    mode: str = "canary",
    share: float = 0.1,
    reason: str = "",
    actor: str | None = None,
    approver: str = "",
) -> SansIoCall[Trial]:
    """Try the candidate of a correction on live requests.

    Args:
        run_id: Id of the run.
        correction_id: Id of the correction.
        mode: `canary`: the candidate responds, and the released version replaces it on
            errors. `shadow`: the released version responds, and the candidate's scores
            are only compared.
        share: Share of the requests, in (0, 1].
        reason: Stored with the trial.
        actor: Stored with the trial; by default the user.
        approver: Person who allows a canary that fails the gate; needs a reason.

    Raises NotReady for a canary that fails the gate without an approver.
    """
    if mode not in {"canary", "shadow"}:
        raise InvalidInput(f"mode {mode!r} is unknown; use canary or shadow")
    trial_ = trial_pb2.Trial(
        correction=names.correction(run_id, correction_id),
        mode=trial_pb2.Trial.Mode.Value(f"MODE_{mode.upper()}"),
        share=share,
        actor=actor or (yield CurrentUser()),
        reason=reason,
        approver=approver,
    )
    request = pb.StartTrialRequest(trial=trial_, request_id=new_request_id())
    response = yield Rpc(method="StartTrial", request=request, timeout_s=_GATE_DEADLINE_S)
    return Trial.from_proto(response.trial)


def trials(model_id: str) -> SansIoCall[list[Trial]]:
    """Return the trials of a model, oldest first."""
    messages = yield from list_all_pages("ListTrials", pb.ListTrialsRequest(model=names.model(model_id)), "trials")
    return [Trial.from_proto(message) for message in messages]


def trial(model_id: str, trial_id: str) -> SansIoCall[Trial]:
    """Return a trial with its counts so far."""
    response = yield Rpc(method="GetTrial", request=pb.GetTrialRequest(name=names.trial(model_id, trial_id)))
    return Trial.from_proto(response.trial)


def stop_trial(model_id: str, trial_id: str) -> SansIoCall[Trial]:
    """End a trial; the candidate receives no more requests afterwards."""
    response = yield Rpc(method="StopTrial", request=pb.StopTrialRequest(name=names.trial(model_id, trial_id)))
    return Trial.from_proto(response.trial)
