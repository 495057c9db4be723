"""`defuse runs` with a fake gateway."""

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.cli import app
from defuse.v1 import dataset_pb2, failure_pb2, generator_service_pb2, model_pb2, run_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from defuse.v1 import generator_service_pb2_grpc as generator_grpc
from typer.testing import CliRunner, Result

CLASSES = ("ant", "bee", "cat")


class Gateway(pb_grpc.GatewayServiceServicer, generator_grpc.GeneratorServiceServicer):
    """Has one run, whose failures are bees predicted as cats."""

    def __init__(self) -> None:
        self.created: list[run_pb2.RunConfig] = []
        self.estimated: list[run_pb2.RunConfig] = []

    def GetFile(self, request: pb.GetFileRequest, context: Any) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        return pb.GetFileResponse()

    def CreateDataset(self, request: pb.CreateDatasetRequest, context: Any) -> pb.CreateDatasetResponse:  # noqa: N802
        return pb.CreateDatasetResponse(dataset=dataset_pb2.Dataset(name=f"datasets/seed-{request.seed}"))

    def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:  # noqa: N802
        self.created.append(request.config)
        return pb.CreateRunResponse(run=run_pb2.Run(name=f"runs/{request.run_id}", config=request.config))

    def EstimateRun(self, request: pb.EstimateRunRequest, context: Any) -> pb.EstimateRunResponse:  # noqa: N802
        self.estimated.append(request.config)
        return pb.EstimateRunResponse(estimate=run_pb2.CostEstimate(sources=7, decodes=70, decodes_per_s=10))

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802
        config = {"model": "models/tiny", "validity": {"min_label_probability": 0.998, "max_round_trip_sd": 1.0}}
        return pb.GetRunResponse(run=run_pb2.Run(name=request.name, config=config))

    def AdviseValidity(self, request: pb.AdviseValidityRequest, context: Any) -> pb.AdviseValidityResponse:  # noqa: N802
        assert request.run == "runs/first"
        advice = run_pb2.ValidityAdvice(
            validity={"min_label_probability": 0.9995, "max_round_trip_sd": 1.0},
            invalid_rejected=0.875,
            valid_rejected=0.0625,
            invalid_regions=2,
            valid_regions=5,
        )
        return pb.AdviseValidityResponse(advice=advice)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(model=model_pb2.Model(name=request.name, classes=CLASSES))

    def Identify(self, request: Any, context: Any) -> Iterator[generator_service_pb2.IdentifyResponse]:  # noqa: N802
        for source in (3, 5):
            failure = failure_pb2.Failure(source=source, true_label=1, predicted_label=2, margin=-0.5, latent=[0.25])
            yield generator_service_pb2.IdentifyResponse(failures=[failure], resume_token=str(source))


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Serve the fake gateway at the default address of the command line."""
    found = Gateway()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GatewayServiceServicer_to_server(found, server)
    generator_grpc.add_GeneratorServiceServicer_to_server(found, server)
    monkeypatch.setenv("DEFUSE_GATEWAY", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    yield found
    server.stop(None).wait()


def defuse(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done


def test_estimate_and_create_share_options(gateway: Gateway, tmp_path: Path) -> None:
    """Both commands have the same options and send the same configuration."""
    for file in ("data.npz", "encoder", "decoder"):
        (tmp_path / file).write_bytes(file.encode())
    options = [
        *("--model", "tiny", "--data", tmp_path / "data.npz", "--seed", 4, "--model-version", 2, "--radius", 0.7),
        *("--draws", 30, "--max-sources", 9, "--strategy", "uniform", "--noise", "released", "--vae-epochs", 3),
        *("--encoder", tmp_path / "encoder", "--decoder", tmp_path / "decoder", "--min-label-probability", 0.5),
        *(
            "--validity-from",
            "before",
            "--oracle",
            "strong",
            "--declared-accuracy",
            0.9,
            "--max-reconstruction-loss",
            0.2,
            "--min-support",
            11,
        ),
    ]
    defuse("runs", "create", *options, "--name", "first", "--json")
    defuse("runs", "estimate", *options, "--json")
    [config] = gateway.created
    assert gateway.estimated == [config]
    assert (config.model, config.model_version, config.dataset, config.seed) == ("models/tiny", 2, "datasets/seed-4", 4)
    search = config.search
    assert (round(search.radius_sd, 6), search.draws_per_source, search.max_sources) == (0.7, 30, 9)
    assert search.strategy == run_pb2.SearchConfig.STRATEGY_UNIFORM
    assert search.noise == run_pb2.SearchConfig.NOISE_RELEASED
    assert config.vae.epochs == 3
    assert len({config.vae.encoder_digest, config.vae.decoder_digest, ""}) == 3
    assert (config.validity.min_label_probability, config.validity.oracle) == (0.5, "models/strong")
    assert config.validity_from == "runs/before"
    preflight = config.preflight
    assert (round(preflight.declared_accuracy, 6), round(preflight.max_reconstruction_loss, 6)) == (0.9, 0.2)
    assert config.mixture.min_support == 11


def test_estimate(gateway: Gateway, tmp_path: Path) -> None:
    """Model and data suffice; the table has the figures."""
    (tmp_path / "data.npz").write_bytes(b"data")
    output = defuse("runs", "estimate", "--model", "tiny", "--data", tmp_path / "data.npz").stdout
    assert "up to 70, 10 per second" in output
    assert [config.search.max_sources for config in gateway.estimated] == [0]


@pytest.mark.usefixtures("gateway")
def test_validity() -> None:
    """The table has present and advised thresholds.

    JSON has the settings of a new run.
    """
    output = " ".join(defuse("runs", "validity", "first").stdout.split())
    for words in (
        "min_label_probability │ 0.998 │ 0.9995",
        "max_round_trip_sd │ 1 │ 1",
        "0.88 of the failures of 2",
        "5",
    ):
        assert words in output
    assert json.loads(defuse("runs", "validity", "first", "--json").stdout) == {
        "validity": {"max_round_trip_sd": 1.0, "min_label_probability": 0.9995},
        "invalid_rejected": 0.875,
        "valid_rejected": 0.0625,
        "invalid_regions": 2,
        "valid_regions": 5,
    }


def test_failures(gateway: Gateway) -> None:
    """Lines and JSON have class names instead of indices."""
    lines = defuse("runs", "failures", "first").stdout.splitlines()
    assert lines == [f"source {source} round 0 draw 0: bee predicted as cat, margin -0.50" for source in (3, 5)]
    for line in defuse("runs", "failures", "first", "--json").stdout.splitlines():
        failure = json.loads(line)
        assert (failure["true_label"], failure["predicted_label"], failure["latent"]) == ("bee", "cat", [0.25])
