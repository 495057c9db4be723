"""`defuse correct` and `defuse corrections` with a fake gateway."""

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.cli import app
from defuse.v1 import correction_pb2, tensor_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from defuse.v1.correction_pb2 import Correction, Training
from typer.testing import CliRunner, Result

NAME = "runs/a-run/corrections/c1"


def estimate(successes: int) -> tensor_pb2.Estimate:
    return tensor_pb2.Estimate(value=successes / 100, low=0.1, high=0.9, successes=successes, trials=100)


def change(value: float) -> correction_pb2.PairedDifference:
    return correction_pb2.PairedDifference(value=value, low=value - 0.01, high=value + 0.01, trials=100, p_value=0.5)


def training(method: Training.Method.ValueType, weight: float, *points: tuple[float, int, float]) -> Training:
    return Training(
        method=method,
        region_weight=weight,
        learning_rate=1e-3,
        points=[
            correction_pb2.Point(share=share, test=estimate(90), regions=estimate(right), test_change=change(value))
            for share, right, value in points
        ],
    )


def succeeded(*, non_inferior: bool = True) -> Correction:
    result = correction_pb2.CorrectionResult(
        test_before=estimate(91),
        test_after=estimate(92),
        regions_after=estimate(88),
        regions=[correction_pb2.RegionChange(region="runs/a-run/regions/r1", label="ant", after=estimate(88))],
        choice={
            "rule": "the best one",
            "method": Training.METHOD_INTERPOLATION,
            "region_weight": 0.5,
            "learning_rate": 1e-3,
            "share": 0.4,
            "non_inferior": non_inferior,
        },
    )
    return Correction(
        name=NAME,
        model="models/tiny",
        base_version=1,
        state=Correction.STATE_SUCCEEDED,
        result=result,
        trainings=[
            training(Training.METHOD_ALL_WEIGHTS, 0.3, (1.0, 70, 0.0)),
            training(Training.METHOD_INTERPOLATION, 0.5, (0.4, 88, 0.01), (1.0, 99, -0.2)),
        ],
    )


class Gateway(pb_grpc.GatewayServiceServicer):
    """Has one correction, in a state that the test sets."""

    def __init__(self) -> None:
        self.created: list[correction_pb2.CorrectionConfig] = []
        self.cancelled: list[str] = []
        self.correction = succeeded()

    def GetFile(self, request: pb.GetFileRequest, context: Any) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        return pb.GetFileResponse()

    def CreateCorrection(self, request: pb.CreateCorrectionRequest, context: Any) -> pb.CreateCorrectionResponse:  # noqa: N802
        self.created.append(request.config)
        return pb.CreateCorrectionResponse(correction=Correction(name=NAME, state=Correction.STATE_RUNNING))

    def WatchCorrection(  # noqa: N802
        self, request: pb.WatchCorrectionRequest, context: Any
    ) -> Iterator[pb.WatchCorrectionResponse]:
        yield pb.WatchCorrectionResponse(correction=self.correction)

    def GetCorrection(self, request: pb.GetCorrectionRequest, context: Any) -> pb.GetCorrectionResponse:  # noqa: N802
        assert request.name == NAME
        return pb.GetCorrectionResponse(correction=self.correction)

    def ListCorrections(self, request: pb.ListCorrectionsRequest, context: Any) -> pb.ListCorrectionsResponse:  # noqa: N802
        return pb.ListCorrectionsResponse(corrections=[self.correction])

    def CancelCorrection(self, request: pb.CancelCorrectionRequest, context: Any) -> pb.CancelCorrectionResponse:  # noqa: N802
        self.cancelled.append(request.name)
        return pb.CancelCorrectionResponse(correction=Correction(name=NAME, state=Correction.STATE_CANCELLED))


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Serve the fake gateway at the default address of the command line."""
    found = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GatewayServiceServicer_to_server(found, server)
    monkeypatch.setenv("DEFUSE_GATEWAY", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("COLUMNS", "160")
    server.start()
    yield found
    server.stop(0).wait()


def defuse(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_options_are_sent(gateway: Gateway, tmp_path: Path) -> None:
    """Given options are sent under the contract's names, omitted ones not."""
    (tmp_path / "net.safetensors").write_bytes(b"weights")
    defuse(
        *("correct", "a-run", "--lambda", "0.1, 0.3", "--learning-rate", "1e-4", "--method", "last_layer,continued"),
        *("--epochs", 4, "--margin", 0.02, "--max-shift", 0.1, "--max-rotation", 5, "--flip", "--seed", 7),
        *("--torch-factory", "acme:net", "--weights", tmp_path / "net.safetensors"),
    )
    [sent] = gateway.created
    digest = sent.torch_factory.weights_digest
    assert len(digest) == 64
    assert sent == correction_pb2.CorrectionConfig(
        region_weights=[0.1, 0.3],
        learning_rates=[1e-4],
        methods=[Training.METHOD_LAST_LAYER, Training.METHOD_CONTINUED],
        epochs=4,
        margin=0.02,
        augmentation={"max_shift": 0.1, "max_rotation_degrees": 5, "horizontal_flip": True},
        seed=7,
        torch_factory={"function": "acme:net", "weights_digest": digest},
    )
    defuse("correct", "a-run")
    assert not gateway.created[1].region_weights
    assert not gateway.created[1].methods


def test_all_methods(gateway: Gateway) -> None:
    """`--method all` sends every method of the contract."""
    defuse("correct", "a-run", "--method", "all")
    assert list(gateway.created[0].methods) == Training.Method.values()[1:]


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(("option", "value"), [("--lambda", "0.1;0.3"), ("--learning-rate", "fast")])
def test_invalid_list_of_numbers(option: str, value: str) -> None:
    """The error names the option; nothing is sent."""
    result = CliRunner().invoke(app, ["correct", "a-run", option, value])
    assert f"{option} is {value!r}" in str(result.exception)


@pytest.mark.usefixtures("gateway")
def test_table_of_points() -> None:
    """The table has every point and marks the chosen one.

    The end of an interpolation is `all_weights`.
    """
    lines = defuse("correct", "a-run", "--wait").output.splitlines()
    rows = [line for line in lines if "0.001" in line]
    assert [("all_weights" in row, "interpolation" in row, "*" in row) for row in rows] == [
        (True, False, False),
        (False, True, True),
        (True, False, False),
    ]
    assert any("Rule: the best one" in line for line in lines)
    assert any("test images" in line and "0.910" in line and "0.920" in line for line in lines)


def test_choice_that_is_not_non_inferior(gateway: Gateway) -> None:
    """The output warns of a choice that is not non-inferior."""
    gateway.correction = succeeded(non_inferior=False)
    assert "no point is non-inferior" in defuse("corrections", "show", "a-run", "c1").output


def test_correction_as_json(gateway: Gateway) -> None:
    """JSON has every point, and the choice with its rule."""
    found = json.loads(defuse("corrections", "show", "a-run", "c1", "--json").stdout)
    assert [(point["method"], point["share"], point["chosen"]) for point in found["points"]] == [
        ("all_weights", 1.0, False),
        ("interpolation", 0.4, True),
        ("all_weights", 1.0, False),
    ]
    assert found["choice"]["rule"] == "the best one"
    assert found["points"][1]["test_change"]["low"] == 0.0


@pytest.mark.parametrize("state", [Correction.STATE_FAILED, Correction.STATE_CANCELLED])
def test_exit_status_of_a_failed_correction(gateway: Gateway, state: Correction.State.ValueType) -> None:
    """The exit status is 2, and the output states the reason."""
    gateway.correction = Correction(name=NAME, state=state, error="the disk is gone")
    assert "the disk is gone" in defuse("correct", "a-run", "--wait", status=2).output
    assert "the disk is gone" in defuse("corrections", "watch", "a-run", "c1", status=2).output


def test_cancel(gateway: Gateway) -> None:
    """The correction is cancelled by its name."""
    assert "cancelled" in defuse("corrections", "cancel", "a-run", "c1").output
    assert gateway.cancelled == [NAME]


@pytest.mark.usefixtures("gateway")
def test_list() -> None:
    """Each correction is a line with its state and its candidate's figures."""
    [row] = [line for line in defuse("corrections", "list", "a-run").output.splitlines() if "c1" in line]
    assert "succeeded" in row
    assert "0.920" in row
