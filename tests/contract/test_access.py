"""The gateway's door as a process of its own: tokens, their roles, and how they are replaced while it runs."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse import Client
from defuse.cli import app
from defuse.errors import DefuseError, PermissionDenied, Unauthenticated, from_rpc_error
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from defuse.v1 import generator_service_pb2, generator_service_pb2_grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from typer.testing import CliRunner

from services.localstack.child_process import free_port
from tests.conftest import ROOT, eventually

MakeToken = Callable[[str, str], str]


def address_of(file: Path) -> str:
    """Return where the gateway with this file of tokens listens."""
    line = next(line for line in (file.parent / "log").read_text().splitlines() if '"listening"' in line)
    return f"127.0.0.1:{json.loads(line)['address'].rpartition(':')[2]}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def write(file: Path, text: str) -> None:
    """Replace a file atomically: a reader finds the old text or the new text."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


@pytest.fixture
def make_token(file: Path) -> MakeToken:
    """Give what adds a token to the gateway's file and returns it."""

    def make(name: str, role: str) -> str:
        command = [sys.executable, "-m", "services.gateway.tokens", str(file), name, role]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return make


@pytest.fixture
def door(file: Path, make_token: MakeToken, tmp_path: Path) -> Iterator[tuple[grpc.Channel, str]]:
    """A gateway that asks for tokens, before no Redis and no Triton; give a channel to it and a viewer's token."""
    token, port = make_token("vera", "viewer"), free_port()
    environment = {
        **os.environ,
        "DEFUSE_HOST": "0.0.0.0",  # as it knows its callers
        "DEFUSE_PORT": str(port),
        "DEFUSE_TOKENS_FILE": str(file),
        "DEFUSE_REDIS_URL": "redis://127.0.0.1:9/0",
        "DEFUSE_TRITON_URL": "127.0.0.1:9",
        "DEFUSE_STORE_URL": f"file://{tmp_path}/store",
    }
    command = [sys.executable, "-m", "services.gateway"]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        process = stack.enter_context(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log))
        stack.callback(process.kill)
        eventually(lambda: "listening" in (tmp_path / "log").read_text(), alive=process)
        yield stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}")), token


def called(call: Callable[..., Any], request: Any, token: str | None = None) -> Any:
    """Make a call; return its answer, or the error that it ends with."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        return call(request, metadata=metadata, timeout=30)
    except grpc.RpcError as error:
        return from_rpc_error(error, address="the door")


def version(channel: grpc.Channel, token: str | None) -> Any:
    return called(pb_grpc.GatewayServiceStub(channel).GetVersion, pb.GetVersionRequest(), token)


def test_who_is_let_in(door: tuple[grpc.Channel, str]) -> None:
    """Without a token, or with one that is not known, nobody is; a viewer looks, and does nothing."""
    channel, viewer = door
    assert [type(version(channel, token)) for token in (None, "wrong", viewer)] == [
        Unauthenticated,
        Unauthenticated,
        pb.GetVersionResponse,
    ]
    denied = called(pb_grpc.GatewayServiceStub(channel).CancelRun, pb.CancelRunRequest(name="runs/a"), viewer)
    assert (type(denied), denied.metadata) == (PermissionDenied, {"role": "operator"})


def test_every_service_of_the_door_is_guarded(door: tuple[grpc.Channel, str]) -> None:
    """Inference, the generator's calls and reflection ask for a token, too."""
    channel, viewer = door
    inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    generator = generator_service_pb2_grpc.GeneratorServiceStub(channel)
    operations = operations_pb2_grpc.OperationsStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    calls: list[tuple[Callable[..., Any], Any]] = [
        (inference.ModelInfer, service_pb2.ModelInferRequest(model_name="tiny")),
        (inference.ServerLive, service_pb2.ServerLiveRequest()),
        (generator.Encode, generator_service_pb2.EncodeRequest()),
        (operations.GetOperation, operations_pb2.GetOperationRequest(name="runs/a/operations/search")),
        (lambda request, **how: next(generator.Identify(request, **how)), generator_service_pb2.IdentifyRequest()),
        (lambda request, **how: next(reflection.ServerReflectionInfo(iter([request]), **how)), question),
    ]
    assert {type(called(call, request)) for call, request in calls} == {Unauthenticated}
    assert Unauthenticated not in {type(called(call, request, viewer)) for call, request in calls}
    cancel = operations_pb2.CancelOperationRequest(name="runs/a/operations/search")
    assert called(operations.CancelOperation, cancel, viewer).metadata == {"role": "operator"}


def test_a_viewer_cancels_no_run_by_leaving(door: tuple[grpc.Channel, str]) -> None:
    """A stream that would cancel its run at its end is an operator's."""
    channel, viewer = door
    identify = generator_service_pb2_grpc.GeneratorServiceStub(channel).Identify
    request = generator_service_pb2.IdentifyRequest(run="runs/a", cancel_run=True)
    denied = called(lambda request, **how: next(identify(request, **how)), request, viewer)
    assert (type(denied), denied.metadata) == (PermissionDenied, {"role": "operator"})


def test_nobody_annotates_in_the_name_of_another(door: tuple[grpc.Channel, str], make_token: MakeToken) -> None:
    """The gateway's own methods look at who is named before they do anything."""
    channel, _ = door
    token = make_token("ann", "admin")
    eventually(lambda: not isinstance(version(channel, token), DefuseError))
    gateway = pb_grpc.GatewayServiceStub(channel)
    calls: list[tuple[Callable[..., Any], Any]] = [
        (gateway.AnnotateRegion, pb.AnnotateRegionRequest(annotation={"region": "?", "annotator": "bob"})),
        (gateway.RollbackModel, pb.RollbackModelRequest(model="?", actor="bob")),
        (gateway.ReleaseCorrection, pb.ReleaseCorrectionRequest(name="?", approver="bob")),
        (gateway.StartTrial, pb.StartTrialRequest(trial={"correction": "?", "actor": "bob"})),
    ]
    assert {called(call, request, token).reason for call, request in calls} == {"NOT_THE_CALLER"}


def test_who_changed_what(
    door: tuple[grpc.Channel, str], make_token: MakeToken, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutating calls are kept, and listed for admins, newest first; denied ones are not."""
    channel, viewer = door
    admin = make_token("ada", "admin")
    eventually(lambda: not isinstance(version(channel, admin), DefuseError))
    gateway = pb_grpc.GatewayServiceStub(channel)
    denied = called(gateway.ListAuditEvents, pb.ListAuditEventsRequest(), viewer)
    assert (type(denied), denied.metadata) == (PermissionDenied, {"role": "admin"})
    called(gateway.CancelRun, pb.CancelRunRequest(name="runs/a"), viewer)
    called(gateway.CancelRun, pb.CancelRunRequest(name="runs/b"), admin)
    called(gateway.CreateDataset, pb.CreateDatasetRequest(uri="nowhere://"), admin)
    with Client(address_of(file), token=admin) as client:
        dataset, run = client.audit_events()
    assert (run.caller, run.role, run.method) == ("ada", "admin", "defuse.v1.GatewayService/CancelRun")
    assert (run.resources, run.code, run.reason) == (("runs/b",), "UNAVAILABLE", "REDIS_UNAVAILABLE")
    assert (dataset.code, dataset.reason) == ("INVALID_ARGUMENT", "BAD_URI")
    monkeypatch.setenv("DEFUSE_GATEWAY", address_of(file))
    monkeypatch.setenv("DEFUSE_TOKEN", admin)
    shown = CliRunner().invoke(app, ["audit", "--limit", "1", "--json"])
    assert [one["method"] for one in json.loads(shown.stdout)] == ["defuse.v1.GatewayService/CreateDataset"]


def test_tokens_are_replaced_while_it_runs(door: tuple[grpc.Channel, str], file: Path, make_token: MakeToken) -> None:
    """A new token is taken, an old one refused once its line is gone, and a broken file locks nobody out."""
    channel, old = door
    new = make_token("vera", "viewer")
    eventually(lambda: not isinstance(version(channel, new), DefuseError))
    lines = file.read_text().splitlines()
    write(file, f"{lines[1]}\n")
    eventually(lambda: isinstance(version(channel, old), Unauthenticated))
    write(file, "nonsense\n")
    answers = [version(channel, new)]
    while "tokens_not_renewed" not in (file.parent / "log").read_text():
        answers.append(version(channel, new))
    assert {type(answer) for answer in answers} == {pb.GetVersionResponse}
