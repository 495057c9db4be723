"""`defuse trials` with a fake gateway."""

import json
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from defuse import Client
from defuse.cli import app
from defuse.errors import InvalidInput, NotReady
from defuse.v1 import correction_pb2, trial_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from typer.testing import CliRunner, Result

Correction, Trial = correction_pb2.Correction, trial_pb2.Trial
NAME = "models/tiny/trials/t1"
COUNTS = trial_pb2.TrialCounts(
    champion_requests=41,
    challenger_requests=17,
    challenger_errors=3,
    compared=96,
    agreed=95,
    dropped=6,
    champion_ms=2.125,
    challenger_ms=7.5,
)


def trial(mode: "Trial.Mode.ValueType" = Trial.MODE_SHADOW, **fields: Any) -> trial_pb2.Trial:
    known = {
        "name": NAME,
        "correction": "runs/a-run/corrections/c2",
        "share": 0.2,
        "state": Trial.STATE_RUNNING,
        "candidate": "tiny-candidate",
        "candidate_version": 3,
        "actor": "ann",
        "reason": "it helps",
        "counts": COUNTS,
        "create_time": {"seconds": 1_700_000_000},
    }
    return Trial(mode=mode, **{**known, **fields})


class Gateway(pb_grpc.GatewayServiceServicer):
    """Has one trial and three corrections; the first two succeeded."""

    def __init__(self) -> None:
        self.started: list[trial_pb2.Trial] = []
        self.stopped: list[str] = []
        self.trial = trial()
        self.corrections = [Correction.STATE_SUCCEEDED, Correction.STATE_SUCCEEDED, Correction.STATE_RUNNING]

    def ListCorrections(self, request: pb.ListCorrectionsRequest, context: Any) -> pb.ListCorrectionsResponse:  # noqa: N802  # gRPC's name
        found = [
            Correction(name=f"{request.run}/corrections/c{number}", state=state)
            for number, state in enumerate(self.corrections, 1)
        ]
        return pb.ListCorrectionsResponse(corrections=found)

    def StartTrial(self, request: pb.StartTrialRequest, context: Any) -> pb.StartTrialResponse:  # noqa: N802
        self.started.append(request.trial)
        return pb.StartTrialResponse(trial=self.trial)

    def GetTrial(self, request: pb.GetTrialRequest, context: Any) -> pb.GetTrialResponse:  # noqa: N802
        assert request.name == NAME
        return pb.GetTrialResponse(trial=self.trial)

    def ListTrials(self, request: pb.ListTrialsRequest, context: Any) -> pb.ListTrialsResponse:  # noqa: N802
        assert request.model == "models/tiny"
        return pb.ListTrialsResponse(trials=[self.trial, trial(Trial.MODE_CANARY, name="models/tiny/trials/t2")])

    def StopTrial(self, request: pb.StopTrialRequest, context: Any) -> pb.StopTrialResponse:  # noqa: N802
        self.stopped.append(request.name)
        ended = trial(state=Trial.STATE_ENDED, end_time={"seconds": 1_700_000_060})
        return pb.StopTrialResponse(trial=ended)


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


def defuse(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_start_shadow(gateway: Gateway) -> None:
    """Mode, share, actor and reason are sent under the contract's names."""
    defuse("trials", "start", "a-run", "--shadow", "--share", "0.2", "--reason", "it helps", "--correction", "c1")
    assert gateway.started == [
        Trial(correction="runs/a-run/corrections/c1", mode=Trial.MODE_SHADOW, share=0.2, actor="ann", reason="it helps")
    ]


def test_start_defaults(gateway: Gateway) -> None:
    """By default the latest succeeded correction gets 10 % of requests."""
    defuse("trials", "start", "a-run")
    assert gateway.started == [
        Trial(correction="runs/a-run/corrections/c2", mode=Trial.MODE_CANARY, share=0.1, actor="ann")
    ]


def test_start_with_an_approver(gateway: Gateway) -> None:
    """Approver, reason and actor are those of the options."""
    defuse("trials", "start", "a-run", "--approver", "bea", "--reason", "it must", "--by", "cid")
    [sent] = gateway.started
    assert (sent.approver, sent.reason, sent.actor) == ("bea", "it must", "cid")


def test_start_without_a_correction(gateway: Gateway) -> None:
    """The error names the command that makes a correction."""
    gateway.corrections = [Correction.STATE_RUNNING]
    error = defuse("trials", "start", "a-run", status=1).exception
    assert isinstance(error, NotReady)
    assert "defuse correct a-run --wait" in error.message
    assert gateway.started == []


def test_unknown_mode(gateway: Gateway) -> None:
    """The client refuses an unknown mode before it sends anything."""
    with Client() as client, pytest.raises(InvalidInput, match="'mirror' is unknown; use canary or shadow"):
        client.start_trial("a-run", "c1", mode="mirror")
    assert gateway.started == []


@pytest.mark.usefixtures("gateway")
def test_show_shadow() -> None:
    """Both versions have a line with requests and mean latencies.

    A sentence states the agreement.
    """
    output = defuse("trials", "show", "tiny", "t1").output
    champion, challenger = (
        next(line for line in output.splitlines() if f" {who} " in line) for who in ("champion", "challenger")
    )
    assert [word for word in ("41", "2.12") if word not in champion] == []
    assert [word for word in ("17", "7.50", "3") if word not in challenger] == []
    assert "95 of 96 images got the same class; 6 sampled requests were not compared" in " ".join(output.split())
    assert "shadow t1 of tiny, running: runs/a-run/corrections/c2, share 0.2" in " ".join(output.split())


def test_show_canary(gateway: Gateway) -> None:
    """A canary compares nothing, so that no agreement is printed."""
    gateway.trial = trial(Trial.MODE_CANARY)
    output = defuse("trials", "show", "tiny", "t1").output
    assert "canary t1 of tiny" in output
    assert "same class" not in output


@pytest.mark.usefixtures("gateway")
def test_stop() -> None:
    """The trial ends, and its counts are printed."""
    output = defuse("trials", "stop", "tiny", "t1").output
    assert "shadow t1 of tiny, ended" in output
    assert "95 of 96" in output


def test_stop_as_json(gateway: Gateway) -> None:
    """JSON has both times of an ended trial."""
    found = json.loads(defuse("trials", "stop", "tiny", "t1", "--json").stdout)
    assert gateway.stopped == [NAME]
    assert (found["state"], found["create_time"], found["end_time"]) == (
        "ended",
        "2023-11-14T22:13:20+00:00",
        "2023-11-14T22:14:20+00:00",
    )


@pytest.mark.usefixtures("gateway")
def test_list() -> None:
    """Each trial is a line with its fields."""
    lines = defuse("trials", "list", "tiny").output.splitlines()
    for trial_id, mode in (("t1", "shadow"), ("t2", "canary")):
        [row] = [line for line in lines if f" {trial_id} " in line]
        assert all(word in row for word in ("running", mode, "0.2", "runs/a-run/corrections/c2", "ann", "it helps")), (
            row
        )


@pytest.mark.usefixtures("gateway")
def test_list_as_json() -> None:
    """JSON has all trials, oldest first."""
    found = json.loads(defuse("trials", "list", "tiny", "--json").stdout)
    assert [(one["id"], one["model"], one["mode"], one["state"]) for one in found] == [
        ("t1", "tiny", "shadow", "running"),
        ("t2", "tiny", "canary", "running"),
    ]


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("arguments", [("show", "tiny", "t1"), ("start", "a-run", "--shadow")])
def test_trial_as_json(arguments: tuple[str, ...]) -> None:
    """JSON has every field; a running trial has no end time."""
    found = json.loads(defuse("trials", *arguments, "--json").stdout)
    assert (found["candidate"], found["candidate_version"], found["share"]) == ("tiny-candidate", 3, 0.2)
    assert (found["correction"], found["reason"], found["approver"]) == ("runs/a-run/corrections/c2", "it helps", "")
    assert found["end_time"] is None
    assert found["counts"] == {field.name: getattr(COUNTS, field.name) for field in COUNTS.DESCRIPTOR.fields}
