"""The decision of the gate, which checks candidates and stores verdicts."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from defuse import names
from defuse.errors import InvalidInput, NotFound, NotReady
from defuse.v1 import correction_pb2, gate_pb2, model_pb2, run_pb2

from services.arrays import as_floats
from services.corrector.correction_data import CorrectionData, HeldOutRegion
from services.corrector.external_triton import AnyReleases
from services.corrector.gate import checks
from services.corrector.gate.checks import CheckResult
from services.corrector.gate.comparison import Comparison, FaultReportingVersion, RegressionBank, ReportProgress
from services.corrector.signature import check_same_signature
from services.statistics.hypothesis_tests import PairedReadings
from services.storage import keys
from services.storage.artifacts import ArtifactStore
from services.storage.catalog import Catalog, LabelledImages, check_fit


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A candidate, and the version that it is compared with."""

    model: model_pb2.Model
    file: bytes
    dataset: str
    base_version: int
    correction: str = ""


class Gate:
    """Decides whether candidates may replace the champion."""

    def __init__(self, store: ArtifactStore, releases: AnyReleases) -> None:
        self._store = store
        self._catalog = Catalog(store)
        self._releases = releases

    def judge_file(self, model_name: str, digest: str, dataset: str = "") -> gate_pb2.GateVerdict:
        """Check an uploaded file as a replacement of the champion.

        The file is served under a temporary name. `dataset` provides the test split; the default is that of the model's
        newest run. Raises NotFound for an unknown model, file or data set, InvalidInput for a data set of other images
        or classes, and NotReady when there is no data set.
        """
        model = self._catalog.model(model_name)
        if not self._store.exists(keys.file(digest)):
            raise NotFound(f"no file {digest} was uploaded; upload the ONNX file first", reason="FILE_NOT_FOUND")
        dataset = dataset or self._dataset_of(model)
        check_fit(model, self._catalog.dataset(dataset))
        file = self._store.read_bytes(keys.file(digest))
        subject = _Subject(model=model, file=file, dataset=dataset, base_version=model.champion_version)
        return self._judged(subject, self._catalog.split(dataset, "test", model))

    def judge_correction(self, correction: correction_pb2.Correction) -> gate_pb2.GateVerdict:
        """Check the candidate of a finished correction, with present annotations."""
        correction_data = CorrectionData(self._store, correction)
        file = self._store.read_bytes(keys.corrected_file(correction.name))
        return self._judged(_subject(correction_data, file), correction_data.test, correction_data)

    def require_passed(
        self, correction: correction_pb2.Correction, *, approver: str = "", reason: str = ""
    ) -> gate_pb2.GateVerdict:
        """Return the verdict that allows a correction to answer callers.

        The newest verdict is reused when it compares with the present champion on all labelled regions; otherwise the
        candidate is checked again. A failed verdict is enough with an approver and a reason. Raises NotReady without
        them.
        """
        verdict = self._newest(correction) or self.judge_correction(correction)
        if not verdict.passed and not (approver and reason):
            failed = [check for check in verdict.checks if not check.passed]
            raise NotReady(
                f"{correction.name} does not pass the gate: {'; '.join(map(describe_check, failed))} "
                f"(verdict {names.last(verdict.name)}); correct again, or give an approver and a reason",
                reason="GATE_NOT_PASSED",
            )
        return verdict

    def verdict_on(
        self, comparison: Comparison, file: bytes, correction_data: CorrectionData, report_progress: ReportProgress
    ) -> gate_pb2.GateVerdict:
        """Check a correction's candidate that is already served and compared."""
        bank = RegressionBank(self._store, comparison.model)
        gain = self._gain(comparison, correction_data)
        found = [checks.file_check(""), *comparison.checks(bank, file, gain=gain, report_progress=report_progress)]
        return self._decide_and_store(_subject(correction_data, file), found, bank.regions())

    def _newest(self, correction: correction_pb2.Correction) -> gate_pb2.GateVerdict | None:
        """Return the correction's newest verdict when it is current, else None.

        A current verdict compares with the present champion, on all labelled regions.
        """
        model = self._catalog.model(correction.model)
        bank = RegressionBank(self._store, model).regions()
        for key in reversed(self._store.keys(f"{model.name}/verdicts")):
            verdict = self._catalog.verdict(key)
            if verdict.correction == correction.name:
                current = verdict.base_version == model.champion_version and dict(verdict.bank) == bank
                return verdict if current else None
        return None

    def _gain(self, comparison: Comparison, correction_data: CorrectionData) -> PairedReadings:
        """Return both versions' correctness on images of the corrected regions.

        The images are held out. The bank's images of these regions are used when none are held out.
        """
        if len((held_out := join_readings([read for _, read in region_readings(comparison, correction_data)])).before):
            return held_out
        bank = RegressionBank(self._store, comparison.model)
        return join_readings(
            [
                comparison.region(as_floats(bank.images(region.region, region.label)), region.label_id)
                for region in correction_data.held_out_regions(deciding=False)
            ]
        )

    def _judged(
        self, subject: _Subject, test: LabelledImages, correction_data: CorrectionData | None = None
    ) -> gate_pb2.GateVerdict:
        """Run all checks on a file and store the verdict.

        The file is served under a temporary name. A file that cannot be run fails.
        """
        model, bank = subject.model, RegressionBank(self._store, subject.model)
        try:
            check_same_signature(model, subject.file)
            with self._releases.serving(model, subject.file) as served:
                comparison = Comparison(
                    self._releases.version(model, subject.base_version), FaultReportingVersion(served), test
                )
                gain = self._gain(comparison, correction_data) if correction_data else None
                found = [checks.file_check(""), *comparison.checks(bank, subject.file, gain=gain)]
        except InvalidInput as error:
            found = [checks.file_check(error.message)]
        return self._decide_and_store(subject, found, bank.regions())

    def _decide_and_store(
        self, subject: _Subject, found: Sequence[CheckResult], bank: Mapping[str, str]
    ) -> gate_pb2.GateVerdict:
        digest = hashlib.sha256(subject.file).hexdigest()
        verdict = gate_pb2.GateVerdict(
            # Seconds come first, so that names sort by time.
            name=f"{subject.model.name}/verdicts/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{digest[:8]}",
            base_version=subject.base_version,
            digest=digest,
            correction=subject.correction,
            dataset=subject.dataset,
            checks=[_check(one) for one in found],
            passed=all(one.passed for one in found),
            bank=bank,
        )
        verdict.create_time.GetCurrentTime()
        self._store.write_message(keys.verdict(verdict.name), verdict)
        return verdict

    def _dataset_of(self, model: model_pb2.Model) -> str:
        runs = self._catalog.runs_of(model.name)
        if not runs:
            raise NotReady(
                f"model {names.last(model.name)!r} has no run, so there is no default data set; name a data set",
                reason="NO_DATASET",
            )
        newest: run_pb2.Run = max(runs, key=lambda run: run.create_time.ToNanoseconds())
        return newest.config.dataset


def region_readings(
    comparison: Comparison, correction_data: CorrectionData
) -> list[tuple[HeldOutRegion, PairedReadings]]:
    """Return both versions' correctness on each corrected region.

    The images are held out. Those that took part in the choice are left out.
    """
    return [
        (region, comparison.region(correction_data.rendered(region.perturbations), region.label_id))
        for region in correction_data.held_out_regions(deciding=False)
    ]


def join_readings(readings: Sequence[PairedReadings]) -> PairedReadings:
    """Return several paired readings as one."""
    return PairedReadings(
        before=np.concatenate([one.before for one in readings]), after=np.concatenate([one.after for one in readings])
    )


def describe_check(check: gate_pb2.Check) -> str:
    """Return the kind, subject, figure and rule of a check as text."""
    kind = gate_pb2.Check.Kind.Name(check.kind).removeprefix("KIND_").lower().replace("_", " ")
    if check.kind == gate_pb2.Check.KIND_FILE:
        return f"{kind}: {check.rule}"
    subject = f" {check.subject}" if check.subject else ""
    return f"{kind}{subject} {check.figure:+.3g} ({check.rule})"


def _subject(correction_data: CorrectionData, file: bytes) -> _Subject:
    """Return a correction's candidate, for comparison with its base version."""
    return _Subject(
        model=correction_data.model,
        file=file,
        dataset=correction_data.run.config.dataset,
        base_version=correction_data.correction.base_version,
        correction=correction_data.correction.name,
    )


def _check(found: CheckResult) -> gate_pb2.Check:
    low, high = found.interval or (None, None)
    return gate_pb2.Check(
        kind=gate_pb2.Check.Kind.Value(f"KIND_{found.kind.upper()}"),
        subject=found.subject,
        figure=found.figure,
        low=low,
        high=high,
        bound=found.bound,
        trials=found.trials,
        passed=found.passed,
        rule=found.rule,
    )
