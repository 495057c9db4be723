# Written by `python -m clients.generate_stubs`. Do not edit.
# ruff: noqa: E501, PYI021  # editors show the docstrings
"""Methods of the clients, made from the tables in `defuse.calls`."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from defuse.values import (
    Alert,
    AuditEvent,
    Correction,
    CostEstimate,
    Dataset,
    FailureBatch,
    GateVerdict,
    Guard,
    Images,
    Interpolation,
    Model,
    MonitorConfig,
    MonitorState,
    Preprocessing,
    Region,
    RegionPictures,
    RegionsDiff,
    Release,
    Run,
    Trial,
    ValidityAdvice,
)

class ClientMethods:
    def version(self) -> str:
        """Return the version of the gateway."""

    def add_model(
        self,
        model_id: str,
        onnx: str | Path | bytes,
        classes: Sequence[str],
        preprocessing: Preprocessing | None = None,
        *,
        output: str = "logits",
    ) -> Model:
        """Register a classifier and serve it as version 1.

        Args:
            model_id: Id of the model, also its name in Triton.
            onnx: The classifier: the path of an ONNX file, or its content.
            classes: Class names in the order of the outputs.
            preprocessing: The map from stored pixels to the classifier's input.
            output: `logits` or `probabilities`.
        """

    def model(self, model_id: str) -> Model:
        """Return a model."""

    def models(self) -> list[Model]:
        """Return all models, by id."""

    def create_guard(self, run_id: str, *, false_alarm_rate: float = 0.0) -> Guard:
        """Make a guard from the labelled regions of a run.

        Triton serves it beside the model. Every release makes a guard as well. `false_alarm_rate` bounds the share of
        correctly classified images that the guard puts inside a region; 0 takes the default of 0.05.
        """

    def guard(self, model_id: str, guard_id: str) -> Guard:
        """Return a guard."""

    def guards(self, model_id: str) -> list[Guard]:
        """Return the guards of a model, oldest first; Triton serves the last."""

    def add_dataset(
        self, source: str | Path, *, seed: int = 0, on_progress: Callable[[int, int], None] = ...
    ) -> Dataset:
        """Create a data set from a directory, a file or a URL.

        The source is a directory of class folders, an `.npz` file, or a URL that the services can read. `seed` draws the
        splits that the source does not have. `on_progress` receives the bytes sent and the total bytes.
        """

    def create_run(self, run_id: str, *, model: str, dataset: str, **settings: Any) -> Run:
        """Start a run.

        `settings` are the other fields of `defuse.calls.runs.RunSettings`.
        """

    def estimate_run(self, *, model: str, dataset: str, **settings: Any) -> CostEstimate:
        """Estimate the cost of a run without starting it.

        The estimate takes a few seconds. `settings` are those of `create_run`.
        """

    def run(self, run_id: str) -> Run:
        """Return a run."""

    def runs(self) -> list[Run]:
        """Return all runs, newest first."""

    def watch_run(self, run_id: str, *, timeout_s: float | None = None) -> Iterator[Run]:
        """Yield a run now and after every change until its end.

        The stream reconnects after connection losses. Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
        """

    def wait_for_run(
        self, run_id: str, *, timeout_s: float | None = None, on_change: Callable[[Run], None] = ...
    ) -> Run:
        """Wait for the end of a run and return it.

        Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
        """

    def cancel_run(self, run_id: str) -> Run:
        """Cancel a run."""

    def failures(self, run_id: str, *, resume_token: str = "", cancel_run: bool = False) -> Iterator[FailureBatch]:
        """Yield batches of failures while the search finds them.

        A slow reader slows the stream down, but loses nothing. Lost connections resume where they broke, and the
        `resume_token` of a batch does the same in another process. With `cancel_run`, closing the iterator before its end
        cancels the run.
        """

    def advise_validity(self, run_id: str) -> ValidityAdvice:
        """Return validity thresholds that would have excluded the invalid regions.

        These are the regions annotated as invalid. `validity_from` of a new run applies the thresholds. Raises NotReady
        without an invalid and a labelled region.
        """

    def regions(self, run_id: str) -> list[Region]:
        """Return the regions of a run, largest score first.

        The list includes the parts of mixed regions.
        """

    def region(self, run_id: str, region_id: str) -> RegionPictures:
        """Return a region with pictures."""

    def sample_region(self, run_id: str, region_id: str, count: int = 16, *, seed: int = 0) -> npt.NDArray[np.uint8]:
        """Draw new images (count, h, w, c) uint8 from a region."""

    def diff_regions(self, before: str, after: str) -> RegionsDiff:
        """Compare the regions of two runs: added, gone, moved or unchanged."""

    def export_regions(self, run_id: str, file: Path) -> Path:
        """Write the regions of a run to a safetensors file.

        Arrays are named `{region}.{name}`, records are JSON metadata. The file has neither annotations nor the parts of
        mixed regions. Returns its path.
        """

    def annotate(
        self, run_id: str, region_id: str, *, label: str = "", verdict: str = "label", annotator: str | None = None
    ) -> Region:
        """Annotate a region with a label or another verdict.

        `verdict` is label, invalid, mixed or unsure. A mixed region such as `r3` is split into parts `r3-1`, `r3-2` and so
        on, which `regions` lists. `annotator` is the user by default. Raises NotReady if the region cannot be split; the
        verdict is stored nevertheless.
        """

    def create_correction(self, run_id: str, **settings: Any) -> Correction:
        """Start a correction with the labelled regions of a run.

        `settings` are the fields of `defuse.calls.corrections.CorrectionSettings`.
        """

    def correction(self, run_id: str, correction_id: str) -> Correction:
        """Return a correction."""

    def corrections(self, run_id: str) -> list[Correction]:
        """Return the corrections of a run, oldest first."""

    def wait_for_correction(
        self,
        run_id: str,
        correction_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Correction], None] = ...,
    ) -> Correction:
        """Wait for the end of a correction and return it.

        Raises DeadlineExceeded after `timeout_s` seconds; the correction continues.
        """

    def cancel_correction(self, run_id: str, correction_id: str) -> Correction:
        """Cancel a correction."""

    def judge(self, model_id: str, onnx: str | Path | bytes, *, dataset: str = "") -> GateVerdict:
        """Check with the gate whether a file may replace the released version.

        `dataset` is the id of the data set whose test split is evaluated, by default that of the model's newest run. A
        broken file fails the gate.
        """

    def verdict(self, model_id: str, verdict_id: str) -> GateVerdict:
        """Return a verdict of the gate."""

    def release(
        self, run_id: str, correction_id: str, *, reason: str = "", actor: str | None = None, approver: str = ""
    ) -> Release:
        """Release the candidate of a correction as a new model version.

        Reason, approver and actor are stored; the actor is the user by default. A release continues during a connection
        loss, and the call waits for it. Raises NotReady for a candidate that fails the gate, unless an `approver` overrides
        it with a `reason`.
        """

    def rollback(self, model_id: str, *, reason: str = "", actor: str | None = None) -> Release:
        """Restore the previous version of a model.

        `reason` and `actor` are stored; the actor is the user by default.
        """

    def releases(self, model_id: str) -> list[Release]:
        """Return the releases of a model, oldest first."""

    def start_trial(
        self,
        run_id: str,
        correction_id: str,
        *,
        mode: str = "canary",
        share: float = 0.1,
        reason: str = "",
        actor: str | None = None,
        approver: str = "",
    ) -> Trial:
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

    def trials(self, model_id: str) -> list[Trial]:
        """Return the trials of a model, oldest first."""

    def trial(self, model_id: str, trial_id: str) -> Trial:
        """Return a trial with its counts so far."""

    def stop_trial(self, model_id: str, trial_id: str) -> Trial:
        """End a trial; the candidate receives no more requests afterwards."""

    def monitor(self, model_id: str) -> MonitorState:
        """Return a model's monitor: traffic, region hits, drift and accuracy."""

    def configure_monitor(
        self,
        model_id: str,
        *,
        expected_run_length: float | None = None,
        retention_s: float | None = None,
        keep: str = "images",
        webhook_url: str = "",
        start_runs: bool = False,
    ) -> MonitorConfig:
        """Replace the configuration of a model's monitor.

        The caller must be an admin. Omitted settings take their defaults. Raises InvalidInput for values out of bounds.

        Args:
            model_id: Id of the model.
            expected_run_length: Observations between two false alarms, in expectation, at
                least.
            retention_s: How long observations are stored, in seconds.
            keep: `images`, or `latents` to delete images after their evaluation.
            webhook_url: URL to which alerts are posted.
            start_runs: Whether an alert about a region starts a run on the images that
                caused it.
        """

    def alerts(self, model_id: str) -> list[Alert]:
        """Return the alerts of a model, newest first."""

    def watch_alerts(self, model_id: str = "") -> Iterator[Alert]:
        """Yield new alerts of a model, or of all models, without end.

        The stream reconnects after connection losses. Alerts that were raised during a connection loss are missing;
        `alerts` lists them.
        """

    def start_alert_run(self, model_id: str, alert_id: str) -> Run:
        """Start a run on the captured images that caused a region alert.

        Returns the existing run of an alert that has one. Raises NotReady if no images were kept.
        """

    def attach_truth(self, model_id: str, truths: Mapping[str, str]) -> int:
        """Attach ground truth to observations, and return the number of known ids.

        `truths` maps observation ids to class names.
        """

    def delete_observations(self, model_id: str, ids: Sequence[str]) -> int:
        """Delete observations, and return the number of known ids.

        Everything derived from their images is deleted as well.
        """

    def audit_events(self, limit: int = 50) -> list[AuditEvent]:
        """Return the latest `limit` audit events, newest first.

        The caller must be an admin. An event is a call that changed something or tried to.
        """

class AsyncClientMethods:
    async def version(self) -> str:
        """Return the version of the gateway."""

    async def add_model(
        self,
        model_id: str,
        onnx: str | Path | bytes,
        classes: Sequence[str],
        preprocessing: Preprocessing | None = None,
        *,
        output: str = "logits",
    ) -> Model:
        """Register a classifier and serve it as version 1.

        Args:
            model_id: Id of the model, also its name in Triton.
            onnx: The classifier: the path of an ONNX file, or its content.
            classes: Class names in the order of the outputs.
            preprocessing: The map from stored pixels to the classifier's input.
            output: `logits` or `probabilities`.
        """

    async def model(self, model_id: str) -> Model:
        """Return a model."""

    async def models(self) -> list[Model]:
        """Return all models, by id."""

    async def create_guard(self, run_id: str, *, false_alarm_rate: float = 0.0) -> Guard:
        """Make a guard from the labelled regions of a run.

        Triton serves it beside the model. Every release makes a guard as well. `false_alarm_rate` bounds the share of
        correctly classified images that the guard puts inside a region; 0 takes the default of 0.05.
        """

    async def guard(self, model_id: str, guard_id: str) -> Guard:
        """Return a guard."""

    async def guards(self, model_id: str) -> list[Guard]:
        """Return the guards of a model, oldest first; Triton serves the last."""

    async def add_dataset(
        self, source: str | Path, *, seed: int = 0, on_progress: Callable[[int, int], None] = ...
    ) -> Dataset:
        """Create a data set from a directory, a file or a URL.

        The source is a directory of class folders, an `.npz` file, or a URL that the services can read. `seed` draws the
        splits that the source does not have. `on_progress` receives the bytes sent and the total bytes.
        """

    async def create_run(self, run_id: str, *, model: str, dataset: str, **settings: Any) -> Run:
        """Start a run.

        `settings` are the other fields of `defuse.calls.runs.RunSettings`.
        """

    async def estimate_run(self, *, model: str, dataset: str, **settings: Any) -> CostEstimate:
        """Estimate the cost of a run without starting it.

        The estimate takes a few seconds. `settings` are those of `create_run`.
        """

    async def run(self, run_id: str) -> Run:
        """Return a run."""

    async def runs(self) -> list[Run]:
        """Return all runs, newest first."""

    def watch_run(self, run_id: str, *, timeout_s: float | None = None) -> AsyncGenerator[Run]:
        """Yield a run now and after every change until its end.

        The stream reconnects after connection losses. Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
        """

    async def wait_for_run(
        self, run_id: str, *, timeout_s: float | None = None, on_change: Callable[[Run], None] = ...
    ) -> Run:
        """Wait for the end of a run and return it.

        Raises DeadlineExceeded after `timeout_s` seconds; the run continues.
        """

    async def cancel_run(self, run_id: str) -> Run:
        """Cancel a run."""

    def failures(
        self, run_id: str, *, resume_token: str = "", cancel_run: bool = False
    ) -> AsyncGenerator[FailureBatch]:
        """Yield batches of failures while the search finds them.

        A slow reader slows the stream down, but loses nothing. Lost connections resume where they broke, and the
        `resume_token` of a batch does the same in another process. With `cancel_run`, closing the iterator before its end
        cancels the run.
        """

    async def advise_validity(self, run_id: str) -> ValidityAdvice:
        """Return validity thresholds that would have excluded the invalid regions.

        These are the regions annotated as invalid. `validity_from` of a new run applies the thresholds. Raises NotReady
        without an invalid and a labelled region.
        """

    async def regions(self, run_id: str) -> list[Region]:
        """Return the regions of a run, largest score first.

        The list includes the parts of mixed regions.
        """

    async def region(self, run_id: str, region_id: str) -> RegionPictures:
        """Return a region with pictures."""

    async def sample_region(
        self, run_id: str, region_id: str, count: int = 16, *, seed: int = 0
    ) -> npt.NDArray[np.uint8]:
        """Draw new images (count, h, w, c) uint8 from a region."""

    async def diff_regions(self, before: str, after: str) -> RegionsDiff:
        """Compare the regions of two runs: added, gone, moved or unchanged."""

    async def export_regions(self, run_id: str, file: Path) -> Path:
        """Write the regions of a run to a safetensors file.

        Arrays are named `{region}.{name}`, records are JSON metadata. The file has neither annotations nor the parts of
        mixed regions. Returns its path.
        """

    async def annotate(
        self, run_id: str, region_id: str, *, label: str = "", verdict: str = "label", annotator: str | None = None
    ) -> Region:
        """Annotate a region with a label or another verdict.

        `verdict` is label, invalid, mixed or unsure. A mixed region such as `r3` is split into parts `r3-1`, `r3-2` and so
        on, which `regions` lists. `annotator` is the user by default. Raises NotReady if the region cannot be split; the
        verdict is stored nevertheless.
        """

    async def create_correction(self, run_id: str, **settings: Any) -> Correction:
        """Start a correction with the labelled regions of a run.

        `settings` are the fields of `defuse.calls.corrections.CorrectionSettings`.
        """

    async def correction(self, run_id: str, correction_id: str) -> Correction:
        """Return a correction."""

    async def corrections(self, run_id: str) -> list[Correction]:
        """Return the corrections of a run, oldest first."""

    async def wait_for_correction(
        self,
        run_id: str,
        correction_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Correction], None] = ...,
    ) -> Correction:
        """Wait for the end of a correction and return it.

        Raises DeadlineExceeded after `timeout_s` seconds; the correction continues.
        """

    async def cancel_correction(self, run_id: str, correction_id: str) -> Correction:
        """Cancel a correction."""

    async def judge(self, model_id: str, onnx: str | Path | bytes, *, dataset: str = "") -> GateVerdict:
        """Check with the gate whether a file may replace the released version.

        `dataset` is the id of the data set whose test split is evaluated, by default that of the model's newest run. A
        broken file fails the gate.
        """

    async def verdict(self, model_id: str, verdict_id: str) -> GateVerdict:
        """Return a verdict of the gate."""

    async def release(
        self, run_id: str, correction_id: str, *, reason: str = "", actor: str | None = None, approver: str = ""
    ) -> Release:
        """Release the candidate of a correction as a new model version.

        Reason, approver and actor are stored; the actor is the user by default. A release continues during a connection
        loss, and the call waits for it. Raises NotReady for a candidate that fails the gate, unless an `approver` overrides
        it with a `reason`.
        """

    async def rollback(self, model_id: str, *, reason: str = "", actor: str | None = None) -> Release:
        """Restore the previous version of a model.

        `reason` and `actor` are stored; the actor is the user by default.
        """

    async def releases(self, model_id: str) -> list[Release]:
        """Return the releases of a model, oldest first."""

    async def start_trial(
        self,
        run_id: str,
        correction_id: str,
        *,
        mode: str = "canary",
        share: float = 0.1,
        reason: str = "",
        actor: str | None = None,
        approver: str = "",
    ) -> Trial:
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

    async def trials(self, model_id: str) -> list[Trial]:
        """Return the trials of a model, oldest first."""

    async def trial(self, model_id: str, trial_id: str) -> Trial:
        """Return a trial with its counts so far."""

    async def stop_trial(self, model_id: str, trial_id: str) -> Trial:
        """End a trial; the candidate receives no more requests afterwards."""

    async def monitor(self, model_id: str) -> MonitorState:
        """Return a model's monitor: traffic, region hits, drift and accuracy."""

    async def configure_monitor(
        self,
        model_id: str,
        *,
        expected_run_length: float | None = None,
        retention_s: float | None = None,
        keep: str = "images",
        webhook_url: str = "",
        start_runs: bool = False,
    ) -> MonitorConfig:
        """Replace the configuration of a model's monitor.

        The caller must be an admin. Omitted settings take their defaults. Raises InvalidInput for values out of bounds.

        Args:
            model_id: Id of the model.
            expected_run_length: Observations between two false alarms, in expectation, at
                least.
            retention_s: How long observations are stored, in seconds.
            keep: `images`, or `latents` to delete images after their evaluation.
            webhook_url: URL to which alerts are posted.
            start_runs: Whether an alert about a region starts a run on the images that
                caused it.
        """

    async def alerts(self, model_id: str) -> list[Alert]:
        """Return the alerts of a model, newest first."""

    def watch_alerts(self, model_id: str = "") -> AsyncGenerator[Alert]:
        """Yield new alerts of a model, or of all models, without end.

        The stream reconnects after connection losses. Alerts that were raised during a connection loss are missing;
        `alerts` lists them.
        """

    async def start_alert_run(self, model_id: str, alert_id: str) -> Run:
        """Start a run on the captured images that caused a region alert.

        Returns the existing run of an alert that has one. Raises NotReady if no images were kept.
        """

    async def attach_truth(self, model_id: str, truths: Mapping[str, str]) -> int:
        """Attach ground truth to observations, and return the number of known ids.

        `truths` maps observation ids to class names.
        """

    async def delete_observations(self, model_id: str, ids: Sequence[str]) -> int:
        """Delete observations, and return the number of known ids.

        Everything derived from their images is deleted as well.
        """

    async def audit_events(self, limit: int = 50) -> list[AuditEvent]:
        """Return the latest `limit` audit events, newest first.

        The caller must be an admin. An event is a call that changed something or tried to.
        """

class LatentSpaceMethods:
    def encode(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return means and standard deviations (n, d) of images' posteriors.

        `images` is (n, h, w, c) uint8.
        """

    def decode(
        self, latents: npt.NDArray[np.floating], *, sources: Sequence[int] | npt.NDArray[np.integer] = ...
    ) -> Images:
        """Return the images (n, h, w, c) uint8 of latents (n, d), rendered as the run does.

        A run with the rendering `residual` needs their `sources`, as `Failure.source`.
        """

    def interpolate(self, first: Images, last: Images, *, frames: int = 30) -> Interpolation:
        """Interpolate between two images in latent space.

        Both images are (h, w, c) uint8. `frames` includes both ends.
        """

class AsyncLatentSpaceMethods:
    async def encode(self, images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return means and standard deviations (n, d) of images' posteriors.

        `images` is (n, h, w, c) uint8.
        """

    async def decode(
        self, latents: npt.NDArray[np.floating], *, sources: Sequence[int] | npt.NDArray[np.integer] = ...
    ) -> Images:
        """Return the images (n, h, w, c) uint8 of latents (n, d), rendered as the run does.

        A run with the rendering `residual` needs their `sources`, as `Failure.source`.
        """

    async def interpolate(self, first: Images, last: Images, *, frames: int = 30) -> Interpolation:
        """Interpolate between two images in latent space.

        Both images are (h, w, c) uint8. `frames` includes both ends.
        """
