"""`defuse gate`, `release`, `rollback` and `releases` with a fake gateway."""

import hashlib
import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.cli import app
from defuse.errors import NotReady
from defuse.v1 import correction_pb2, gate_pb2, release_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from typer.testing import CliRunner, Result

Check, Correction, Release = gate_pb2.Check, correction_pb2.Correction, release_pb2.Release
ONNX = b"an onnx file"
DIGEST = hashlib.sha256(ONNX).hexdigest()
WHEN = {"seconds": 1_700_000_000}
CHECKS = (
    Check(kind=Check.KIND_FILE, passed=True, rule="it is served"),
    Check(
        kind=Check.KIND_TEST, figure=0.0125, low=-0.004, high=0.029, bound=-0.01, trials=900, passed=True, rule="R-TEST"
    ),
    Check(kind=Check.KIND_CLASS, subject="bee", figure=-0.25, low=-0.4, high=-0.1, rule="R-CLASS"),
    Check(kind=Check.KIND_REGION, subject="runs/a-run/regions/r7", figure=0.5, low=0.0, high=1.0, passed=True),
    Check(kind=Check.KIND_PARITY, subject="cpu, 8 images", figure=0.75, bound=1e-3, rule="R-PARITY"),
    Check(kind=Check.KIND_LATENCY, subject="8", figure=1.5, bound=1.1, trials=30, passed=True, rule="R-LATENCY"),
)

# What people read of each.
KINDS = {
    "file": ("ok", "as served", "it is served"),
    "test": ("ok", "0.0125 [-0.004, 0.029]", "R-TEST"),
    "class": ("bee", "-0.25 [-0.4, -0.1]", "R-CLASS"),
    "region": ("ok", "a-run r7", "0.5 [0, 1]"),
    "parity": ("cpu, 8 images", "0.75", "R-PARITY"),
    "latency": ("ok", "1.5", "R-LATENCY"),
}


def verdict(*, passed: bool = False) -> gate_pb2.GateVerdict:
    return gate_pb2.GateVerdict(
        name="models/tiny/verdicts/v1",
        base_version=4,
        digest=DIGEST,
        dataset="datasets/digits",
        checks=CHECKS,
        passed=passed,
        create_time=WHEN,
    )


HISTORY = (
    Release(model="models/tiny", kind=Release.KIND_REGISTERED, version=1, create_time=WHEN),
    Release(
        model="models/tiny",
        kind=Release.KIND_RELEASED,
        version=2,
        previous_version=1,
        correction="runs/a-run/corrections/c1",
        verdict="models/tiny/verdicts/v7",
        actor="ann",
        reason="it passes",
        create_time=WHEN,
    ),
    Release(
        model="models/tiny",
        kind=Release.KIND_RELEASED,
        version=3,
        previous_version=2,
        correction="runs/a-run/corrections/c2",
        verdict="models/tiny/verdicts/v8",
        actor="ann",
        reason="it must",
        approver="bea",
        create_time=WHEN,
    ),
    Release(
        model="models/tiny",
        kind=Release.KIND_ROLLED_BACK,
        version=2,
        previous_version=3,
        actor="cid",
        reason="it fell over",
        create_time=WHEN,
    ),
)


def without_id(request: Any) -> Any:
    """Return a request without its random request id."""
    assert len(request.request_id) == 36
    request.ClearField("request_id")
    return request


class Gateway(pb_grpc.GatewayServiceServicer):
    """Has a verdict, four releases and three corrections, the first two succeeded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.judged: list[pb.JudgeCandidateRequest] = []
        self.released: list[pb.ReleaseCorrectionRequest] = []
        self.rolled_back: list[pb.RollbackModelRequest] = []
        self.verdict = verdict()
        self.history = list(HISTORY)
        self.corrections = [Correction.STATE_SUCCEEDED, Correction.STATE_SUCCEEDED, Correction.STATE_FAILED]

    def GetFile(self, request: pb.GetFileRequest, context: Any) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        if request.digest not in self.files:
            context.abort(grpc.StatusCode.NOT_FOUND, "it was not uploaded")
        return pb.GetFileResponse()

    def UploadFile(  # noqa: N802
        self, request_iterator: Iterator[pb.UploadFileRequest], context: Any
    ) -> pb.UploadFileResponse:
        data = b"".join(request.chunk for request in request_iterator)
        digest = hashlib.sha256(data).hexdigest()
        self.files[digest] = data
        return pb.UploadFileResponse(digest=digest)

    def JudgeCandidate(self, request: pb.JudgeCandidateRequest, context: Any) -> pb.JudgeCandidateResponse:  # noqa: N802
        self.judged.append(request)
        return pb.JudgeCandidateResponse(verdict=self.verdict)

    def ListCorrections(self, request: pb.ListCorrectionsRequest, context: Any) -> pb.ListCorrectionsResponse:  # noqa: N802
        found = [
            Correction(name=f"{request.run}/corrections/c{number}", state=state)
            for number, state in enumerate(self.corrections, 1)
        ]
        return pb.ListCorrectionsResponse(corrections=found)

    def GetCorrection(self, request: pb.GetCorrectionRequest, context: Any) -> pb.GetCorrectionResponse:  # noqa: N802
        return pb.GetCorrectionResponse(correction=Correction(name=request.name))

    def ReleaseCorrection(self, request: pb.ReleaseCorrectionRequest, context: Any) -> pb.ReleaseCorrectionResponse:  # noqa: N802
        self.released.append(without_id(request))
        return pb.ReleaseCorrectionResponse(release=HISTORY[2])

    def RollbackModel(self, request: pb.RollbackModelRequest, context: Any) -> pb.RollbackModelResponse:  # noqa: N802
        self.rolled_back.append(without_id(request))
        return pb.RollbackModelResponse(release=HISTORY[3])

    def ListReleases(self, request: pb.ListReleasesRequest, context: Any) -> pb.ListReleasesResponse:  # noqa: N802
        assert request.model == "models/tiny"
        return pb.ListReleasesResponse(releases=self.history)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Serve the fake gateway at the default address of the user `ann`."""
    found = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GatewayServiceServicer_to_server(found, server)
    monkeypatch.setenv("DEFUSE_GATEWAY", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LOGNAME", "ann")
    server.start()
    yield found
    server.stop(0).wait()


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "candidate.onnx"
    path.write_bytes(ONNX)
    return path


def defuse(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_gate_uploads_the_file(gateway: Gateway, onnx: Path) -> None:
    """The gate receives the file's digest and the given data set."""
    gateway.verdict = verdict(passed=True)
    defuse("gate", "tiny", "--onnx", onnx, "--dataset", "digits")
    defuse("gate", "tiny", "--onnx", onnx)
    assert gateway.files == {DIGEST: ONNX}
    assert gateway.judged == [
        pb.JudgeCandidateRequest(model="models/tiny", file_digest=DIGEST, dataset=dataset)
        for dataset in ("datasets/digits", "")
    ]


@pytest.mark.usefixtures("gateway")
def test_gate_with_failed_checks(onnx: Path) -> None:
    """The exit status is 2.

    The table has every check with its figure and rule.
    """
    output = defuse("gate", "tiny", "--onnx", onnx, status=2).output
    rows = {kind: next(line for line in output.splitlines() if f" {kind} " in line) for kind in KINDS}
    assert [kind for kind, row in rows.items() if "FAILED" in row] == ["class", "parity"]
    for kind, words in KINDS.items():
        assert all(word in rows[kind] for word in words), rows[kind]
    assert "2 of 6 checks failed" in " ".join(output.split())
    assert f"candidate {DIGEST[:12]} against version 4 of tiny" in output


def test_gate_passed(gateway: Gateway, onnx: Path) -> None:
    """The exit status is 0, and the table states it."""
    gateway.verdict = verdict(passed=True)
    assert "tiny: passed" in defuse("gate", "tiny", "--onnx", onnx).output


def test_gate_with_an_unfit_file(gateway: Gateway, onnx: Path) -> None:
    """A broken file is a failed check, not an error."""
    broken = Check(kind=Check.KIND_FILE, rule="Triton does not serve it")
    gateway.verdict = gate_pb2.GateVerdict(name="models/tiny/verdicts/v2", checks=[broken])
    output = defuse("gate", "tiny", "--onnx", onnx, status=2).output
    assert "unfit" in output
    assert "Triton does not serve it" in output


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 2)])
def test_gate_as_json(gateway: Gateway, onnx: Path, passed: bool, status: int) -> None:
    """JSON has figures with intervals, or null for missing ends."""
    gateway.verdict = verdict(passed=passed)
    found = json.loads(defuse("gate", "tiny", "--onnx", onnx, "--json", status=status).stdout)
    assert (found["passed"], found["id"], found["model"], found["base_version"]) == (passed, "v1", "tiny", 4)
    assert (found["digest"], found["dataset"], found["correction"]) == (DIGEST, "digits", "")
    assert found["create_time"] == "2023-11-14T22:13:20+00:00"
    assert [check["kind"] for check in found["checks"]] == list(KINDS)
    assert [check["passed"] for check in found["checks"]] == [True, True, False, True, False, True]
    test, parity, region = found["checks"][1], found["checks"][4], found["checks"][3]
    assert (test["low"], test["high"], test["bound"], test["trials"]) == (-0.004, 0.029, -0.01, 900)
    assert (parity["low"], parity["high"], parity["figure"]) == (None, None, 0.75)
    assert (region["low"], region["subject"]) == (0.0, "a-run r7")


def test_release_options_are_sent(gateway: Gateway) -> None:
    """Approver, reason and actor are sent under the contract's names."""
    arguments = ("release", "a-run", "--correction", "c1", "--approver", "bea", "--reason", "it must", "--by", "cid")
    output = defuse(*arguments).output
    assert gateway.released == [
        pb.ReleaseCorrectionRequest(name="runs/a-run/corrections/c1", actor="cid", reason="it must", approver="bea")
    ]
    assert "tiny now serves version 3 (before: 2)" in output


def test_release_defaults(gateway: Gateway) -> None:
    """By default the user releases the latest succeeded correction, without an approver."""
    defuse("release", "a-run")
    assert gateway.released == [pb.ReleaseCorrectionRequest(name="runs/a-run/corrections/c2", actor="ann")]


def test_release_without_a_correction(gateway: Gateway) -> None:
    """The error names the command that makes a correction."""
    gateway.corrections = [Correction.STATE_RUNNING]
    error = defuse("release", "a-run", status=1).exception
    assert isinstance(error, NotReady)
    assert "defuse correct a-run --wait" in error.message
    assert gateway.released == []


def test_release_as_json(gateway: Gateway) -> None:
    """JSON has the verdict's id and the approver."""
    found = json.loads(defuse("release", "a-run", "--json").stdout)
    assert (found["kind"], found["version"], found["previous_version"]) == ("released", 3, 2)
    assert (found["verdict"], found["actor"], found["approver"], found["reason"]) == ("v8", "ann", "bea", "it must")


def test_rollback(gateway: Gateway) -> None:
    """Actor and reason are sent; the actor is the user by default."""
    assert "tiny now serves version 2 (before: 3)" in defuse("rollback", "tiny", "--reason", "it fell over").output
    found = json.loads(defuse("rollback", "tiny", "--by", "cid", "--json").stdout)
    assert gateway.rolled_back == [
        pb.RollbackModelRequest(model="models/tiny", actor="ann", reason="it fell over"),
        pb.RollbackModelRequest(model="models/tiny", actor="cid"),
    ]
    assert (found["kind"], found["version"], found["approver"]) == ("rolled_back", 2, "")


@pytest.mark.usefixtures("gateway")
def test_releases_table() -> None:
    """Each release is a line with time, actor, reason and verdict."""
    rows = [line for line in defuse("releases", "tiny").output.splitlines() if "2023-11-14 22:13:20 UTC" in line]
    expected = (
        ("registered",),
        ("released", "ann", "it passes", "passed"),
        ("released", "ann", "it must", "failed, approved by bea"),
        ("rolled back", "cid", "it fell over"),
    )
    assert len(rows) == len(expected)
    for row, words in zip(rows, expected, strict=True):
        assert all(word in row for word in words), row
    assert not any("passed" in rows[number] for number in (0, 3))


@pytest.mark.usefixtures("gateway")
def test_releases_as_json() -> None:
    """JSON has all releases, oldest first."""
    found = json.loads(defuse("releases", "tiny", "--json").stdout)
    assert [(one["kind"], one["version"], one["verdict"], one["approver"]) for one in found] == [
        ("registered", 1, "", ""),
        ("released", 2, "v7", ""),
        ("released", 3, "v8", "bea"),
        ("rolled_back", 2, "", ""),
    ]
    assert found[1]["correction"] == "runs/a-run/corrections/c1"


@pytest.mark.parametrize("reason", ["[hotfix] it must", "[/hotfix] it must"])
def test_reasons_are_not_markup(gateway: Gateway, reason: str) -> None:
    """Words in brackets are printed unchanged."""
    gateway.history = [Release(model="models/tiny", kind=Release.KIND_ROLLED_BACK, version=1, reason=reason)]
    assert reason in defuse("releases", "tiny").output
