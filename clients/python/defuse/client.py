"""The client of the gateway: one method a call, deadlines by default, errors by class."""

import getpass
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from defuse import names, tensors
from defuse.connection import Connection, find_gateway
from defuse.correction_settings import CorrectionSettings, correction_config
from defuse.errors import InvalidInput
from defuse.latent_space import LatentSpace
from defuse.run_settings import RunSettings, run_config
from defuse.uploads import dataset_file, read_file, upload_bytes, upload_file
from defuse.v1 import annotation_pb2, generator_service_pb2, model_pb2, trial_pb2
from defuse.v1 import (
    gateway_service_pb2 as pb,
)
from defuse.values import (
    Correction,
    CostEstimate,
    Dataset,
    FailureBatch,
    GateVerdict,
    Model,
    Preprocessing,
    Region,
    RegionPictures,
    RegionsDiff,
    Release,
    Run,
    Trial,
    ValidityAdvice,
)

# Registering and releasing load a model in Triton.
_LOAD_DEADLINE_S = 150.0
# The services read a whole data set, perhaps from a URL, before they answer.
_DATASET_DEADLINE_S = 3600.0
_VERDICTS = {"label", "invalid", "mixed", "unsure"}
# The gate asks two versions about all test images.
_GATE_DEADLINE_S = 900.0
_ESTIMATE_DEADLINE_S = 120.0
# A region that is mixed is split before the answer comes.
_SPLIT_DEADLINE_S = 150.0
# Runs with VAEs of their own are compared by decoding and encoding.
_DIFF_DEADLINE_S = 120.0


class Client:
    """A connection to a gateway. Use it as a context manager, or call `close`.

    Args:
        address: HOST:PORT of the gateway. By default `DEFUSE_GATEWAY`, else the local stack that `defuse up` started.
        timeout_s: Deadline of calls that answer at once.

    Every method raises a subclass of DefuseError: see `defuse.errors`.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0) -> None:
        self._connection = Connection(address or find_gateway(), timeout_s=timeout_s)
        self.address = self._connection.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def version(self) -> str:
        """Return the version of the system that answers."""
        return str(self._connection.call("GetVersion", pb.GetVersionRequest()).version)

    # Models.

    def add_model(
        self,
        model_id: str,
        onnx: str | Path | bytes,
        classes: Sequence[str],
        preprocessing: Preprocessing | None = None,
        *,
        output: str = "logits",
    ) -> Model:
        """Register a classifier and serve it as version 1; `output` is `logits` or `probabilities`."""
        if output not in {"logits", "probabilities"}:
            raise InvalidInput(f"output {output!r} is unknown; use logits or probabilities")
        file = onnx if isinstance(onnx, bytes) else read_file(Path(onnx))
        model = model_pb2.Model(
            name=names.model(model_id),
            classes=classes,
            preprocessing=(preprocessing or Preprocessing()).to_proto(),
            output=model_pb2.Model.Output.Value(f"OUTPUT_{output.upper()}"),
        )
        request = pb.CreateModelRequest(model=model, file_digest=upload_bytes(self._connection, file))
        return Model.from_proto(self._connection.call("CreateModel", request, timeout_s=_LOAD_DEADLINE_S).model)

    def model(self, model_id: str) -> Model:
        """Return a model."""
        return Model.from_proto(self._connection.call("GetModel", pb.GetModelRequest(name=names.model(model_id))).model)

    def models(self) -> list[Model]:
        """Return all models, by id."""
        return [Model.from_proto(model) for model in self._listed("ListModels", pb.ListModelsRequest(), "models")]

    def releases(self, model_id: str) -> list[Release]:
        """Return the releases of a model, oldest first."""
        request = pb.ListReleasesRequest(model=names.model(model_id))
        return [Release.from_proto(release) for release in self._listed("ListReleases", request, "releases")]

    def judge(self, model_id: str, onnx: str | Path | bytes, *, dataset: str = "") -> GateVerdict:
        """Ask the gate whether a file may take the place of the version that callers of a model get.

        `dataset` is the id of the data set whose test split is asked about, by default that of the model's newest run.
        A broken file is a verdict that is not passed.
        """
        file = onnx if isinstance(onnx, bytes) else read_file(Path(onnx))
        request = pb.JudgeCandidateRequest(
            model=names.model(model_id),
            file_digest=upload_bytes(self._connection, file),
            dataset=names.dataset(dataset) if dataset else "",
        )
        answer = self._connection.call("JudgeCandidate", request, timeout_s=_GATE_DEADLINE_S)
        return GateVerdict.from_proto(answer.verdict)

    def verdict(self, model_id: str, verdict_id: str) -> GateVerdict:
        """Return what the gate said."""
        request = pb.GetVerdictRequest(name=names.verdict(model_id, verdict_id))
        return GateVerdict.from_proto(self._connection.call("GetVerdict", request).verdict)

    def rollback(self, model_id: str, *, reason: str = "", actor: str | None = None) -> Release:
        """Give callers the version before the present one; `actor`, by default the user, and `reason` are kept."""
        request = pb.RollbackModelRequest(model=names.model(model_id), actor=actor or getpass.getuser(), reason=reason)
        return Release.from_proto(self._connection.call("RollbackModel", request, timeout_s=_LOAD_DEADLINE_S).release)

    # Data sets.

    def add_dataset(
        self, source: str | Path, *, seed: int = 0, on_progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> Dataset:
        """Make a data set of a directory of class folders, an `.npz`, or a URL that the services can read.

        `on_progress` is told the bytes sent and the bytes in all. What the gateway has already is not sent again.
        """
        if "://" in str(source):
            request = pb.CreateDatasetRequest(uri=str(source), display_name=str(source), seed=seed)
        else:
            with dataset_file(Path(source)) as path:
                digest = upload_file(self._connection, path, on_progress)
            request = pb.CreateDatasetRequest(file_digest=digest, display_name=str(source), seed=seed)
        return Dataset.from_proto(
            self._connection.call("CreateDataset", request, timeout_s=_DATASET_DEADLINE_S).dataset
        )

    # Runs.

    def create_run(self, run_id: str, *, model: str, dataset: str, **settings: Any) -> Run:
        """Start a run. `settings` are those of `RunSettings`: what differs from the defaults."""
        config = run_config(self._connection, RunSettings(model=model, dataset=dataset, **settings))
        return Run.from_proto(self._connection.call("CreateRun", pb.CreateRunRequest(run_id=run_id, config=config)).run)

    def estimate_run(self, *, model: str, dataset: str, **settings: Any) -> CostEstimate:
        """Say what a run with these settings would cost, without starting it; takes a few seconds."""
        config = run_config(self._connection, RunSettings(model=model, dataset=dataset, **settings))
        answer = self._connection.call(
            "EstimateRun", pb.EstimateRunRequest(config=config), timeout_s=_ESTIMATE_DEADLINE_S
        )
        return CostEstimate.from_proto(answer.estimate)

    def run(self, run_id: str) -> Run:
        """Return a run."""
        return Run.from_proto(self._connection.call("GetRun", pb.GetRunRequest(name=names.run(run_id))).run)

    def runs(self) -> list[Run]:
        """Return all runs, newest first."""
        return [Run.from_proto(run) for run in self._listed("ListRuns", pb.ListRunsRequest(), "runs")]

    def watch_run(self, run_id: str, *, timeout_s: float | None = None) -> Iterator[Run]:
        """Yield a run now and whenever it changes, until it has ended; lost connections are made again.

        Raises DeadlineExceeded after `timeout_s` seconds; the run goes on.
        """
        request = pb.WatchRunRequest(name=names.run(run_id))
        for answer in self._connection.watch("WatchRun", request, timeout_s):
            yield Run.from_proto(answer.run)

    def wait_for_run(
        self, run_id: str, *, timeout_s: float | None = None, on_change: Callable[[Run], None] = lambda _: None
    ) -> Run:
        """Wait until a run has ended and return it; raise DeadlineExceeded after `timeout_s` seconds."""
        run = None
        for run in self.watch_run(run_id, timeout_s=timeout_s):
            on_change(run)
        return run or self.run(run_id)

    def cancel_run(self, run_id: str) -> Run:
        """Stop a run."""
        return Run.from_proto(self._connection.call("CancelRun", pb.CancelRunRequest(name=names.run(run_id))).run)

    def failures(self, run_id: str, *, resume_token: str = "", cancel_run: bool = False) -> Iterator[FailureBatch]:
        """Yield a run's failures as they are found, until its search has ended; a slow reader is waited for.

        Lost connections are made again where they broke off; `resume_token` of a batch does the same in another
        process. With `cancel_run` the run is cancelled when the iterator is closed before its end.
        """
        request = generator_service_pb2.IdentifyRequest(run=names.run(run_id), resume_token=resume_token)
        try:
            for answer in self._connection.watch("Identify", request, None):
                yield FailureBatch.from_proto(answer)
                request.resume_token = answer.resume_token
        except GeneratorExit:
            if cancel_run:  # said by a call of its own: a connection that is lost must not cancel anything
                self.cancel_run(run_id)
            raise

    def advise_validity(self, run_id: str) -> ValidityAdvice:
        """Say which validity thresholds would have kept the regions out that people called invalid.

        `validity_from` of a new run takes them. Raises NotReady unless a region is invalid and another one labelled.
        """
        answer = self._connection.call("AdviseValidity", pb.AdviseValidityRequest(run=names.run(run_id)))
        return ValidityAdvice.from_proto(answer.advice)

    def latent_space(self, run_id: str) -> LatentSpace:
        """Return the run's VAE: encode, decode, interpolate."""
        return LatentSpace(self._connection, run_id)

    # Regions.

    def regions(self, run_id: str) -> list[Region]:
        """Return the regions of a run by score, descending; those that are mixed come with their parts."""
        request = pb.ListRegionsRequest(run=names.run(run_id))
        return [Region.from_proto(region) for region in self._listed("ListRegions", request, "regions")]

    def region(self, run_id: str, region_id: str) -> RegionPictures:
        """Return a region with pictures."""
        answer = self._connection.call("GetRegion", pb.GetRegionRequest(name=names.region(run_id, region_id)))
        return RegionPictures.from_proto(answer)

    def sample_region(self, run_id: str, region_id: str, count: int = 16, *, seed: int = 0) -> npt.NDArray[np.uint8]:
        """Draw fresh images (count, h, w, c) from a region."""
        request = pb.SampleRegionImagesRequest(region=names.region(run_id, region_id), count=count, seed=seed)
        return tensors.images_from_proto(self._connection.call("SampleRegionImages", request).images)

    def diff_regions(self, before: str, after: str) -> RegionsDiff:
        """Say which regions of the run `after` are new, gone or moved, beside those of the run `before`."""
        request = pb.DiffRegionsRequest(before=names.run(before), after=names.run(after))
        return RegionsDiff.from_proto(self._connection.call("DiffRegions", request, timeout_s=_DIFF_DEADLINE_S).diff)

    def export_regions(self, run_id: str, file: Path) -> Path:
        """Write the regions of a run to a safetensors file: arrays by `{region}.{name}`, records as JSON metadata.

        Annotations are not in it, nor the parts of mixed regions.
        """
        request = pb.ExportRegionsRequest(run=names.run(run_id))
        parts = []
        for part in self._connection.watch("ExportRegions", request, None):
            parts.append(part.data)
            request.offset += len(part.data)
        file.write_bytes(b"".join(parts))
        return file

    def annotate(
        self, run_id: str, region_id: str, *, label: str = "", verdict: str = "label", annotator: str | None = None
    ) -> Region:
        """Say what a region shows: a label, or the verdict invalid, mixed or unsure.

        One that is mixed is split into parts, `r3-1` of `r3` and so on, which `regions` lists. Raises NotReady where it
        has none; the verdict is stored all the same.
        """
        if verdict not in _VERDICTS:
            raise InvalidInput(f"verdict {verdict!r} is unknown; use one of {', '.join(sorted(_VERDICTS))}")
        annotation = annotation_pb2.Annotation(
            region=names.region(run_id, region_id),
            verdict=annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{verdict.upper()}"),
            label=label,
            annotator=annotator or getpass.getuser(),
        )
        answer = self._connection.call(
            "AnnotateRegion",
            pb.AnnotateRegionRequest(annotation=annotation),
            timeout_s=_SPLIT_DEADLINE_S if verdict == "mixed" else None,
        )
        return Region.from_proto(answer.region)

    # Corrections.

    def create_correction(self, run_id: str, **settings: Any) -> Correction:
        """Start a correction with the labelled regions of a run. `settings` are those of `CorrectionSettings`."""
        config = correction_config(self._connection, CorrectionSettings(**settings))
        answer = self._connection.call(
            "CreateCorrection", pb.CreateCorrectionRequest(run=names.run(run_id), config=config)
        )
        return Correction.from_proto(answer.correction)

    def correction(self, run_id: str, correction_id: str) -> Correction:
        """Return a correction."""
        request = pb.GetCorrectionRequest(name=names.correction(run_id, correction_id))
        return Correction.from_proto(self._connection.call("GetCorrection", request).correction)

    def corrections(self, run_id: str) -> list[Correction]:
        """Return the corrections of a run, oldest first."""
        request = pb.ListCorrectionsRequest(run=names.run(run_id))
        return [Correction.from_proto(found) for found in self._listed("ListCorrections", request, "corrections")]

    def wait_for_correction(
        self,
        run_id: str,
        correction_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Correction], None] = lambda _: None,
    ) -> Correction:
        """Wait until a correction has ended and return it; raise DeadlineExceeded after `timeout_s` seconds."""
        request = pb.WatchCorrectionRequest(name=names.correction(run_id, correction_id))
        for answer in self._connection.watch("WatchCorrection", request, timeout_s):
            on_change(Correction.from_proto(answer.correction))
        return self.correction(run_id, correction_id)

    def cancel_correction(self, run_id: str, correction_id: str) -> Correction:
        """Stop a correction."""
        request = pb.CancelCorrectionRequest(name=names.correction(run_id, correction_id))
        return Correction.from_proto(self._connection.call("CancelCorrection", request).correction)

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
        """Try a correction's candidate on a share of the requests that the gateway answers.

        `canary`: it answers them; where it fails, the version that callers get does. `shadow`: it is asked beside that
        version, and answers are compared. Raises NotReady for a canary that does not pass the gate, unless an
        `approver` with a `reason` lets it through.
        """
        if mode not in {"canary", "shadow"}:
            raise InvalidInput(f"mode {mode!r} is unknown; use canary or shadow")
        trial = trial_pb2.Trial(
            correction=names.correction(run_id, correction_id),
            mode=trial_pb2.Trial.Mode.Value(f"MODE_{mode.upper()}"),
            share=share,
            actor=actor or getpass.getuser(),
            reason=reason,
            approver=approver,
        )
        request = pb.StartTrialRequest(trial=trial)
        return Trial.from_proto(self._connection.call("StartTrial", request, timeout_s=_GATE_DEADLINE_S).trial)

    def trials(self, model_id: str) -> list[Trial]:
        """Return the trials of a model, oldest first."""
        request = pb.ListTrialsRequest(model=names.model(model_id))
        return [Trial.from_proto(trial) for trial in self._listed("ListTrials", request, "trials")]

    def trial(self, model_id: str, trial_id: str) -> Trial:
        """Return a trial with what was seen so far."""
        request = pb.GetTrialRequest(name=names.trial(model_id, trial_id))
        return Trial.from_proto(self._connection.call("GetTrial", request).trial)

    def stop_trial(self, model_id: str, trial_id: str) -> Trial:
        """End a trial; when this returns, the candidate answers no caller any more."""
        request = pb.StopTrialRequest(name=names.trial(model_id, trial_id))
        return Trial.from_proto(self._connection.call("StopTrial", request).trial)

    def release(
        self, run_id: str, correction_id: str, *, reason: str = "", actor: str | None = None, approver: str = ""
    ) -> Release:
        """Publish a correction as a new version of its model.

        Raises NotReady where it does not pass the gate, unless an `approver` with a `reason` lets it through; they and
        `actor`, by default the user, are kept.
        """
        request = pb.ReleaseCorrectionRequest(
            name=names.correction(run_id, correction_id),
            actor=actor or getpass.getuser(),
            reason=reason,
            approver=approver,
        )
        return Release.from_proto(
            self._connection.call("ReleaseCorrection", request, timeout_s=_GATE_DEADLINE_S).release
        )

    def _listed(self, method: str, request: Any, entries: str) -> Iterator[Any]:
        """Yield the entries of all pages of a list."""
        while True:
            answer = self._connection.call(method, request)
            yield from getattr(answer, entries)
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token
