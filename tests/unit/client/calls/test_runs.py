import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.calls.runs import RunSettings, run_config
from defuse.client import execute_call
from defuse.connection import Connection
from defuse.errors import InvalidInput
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from defuse.v1 import run_pb2

from tests.unit.client.gateway_server import connected


class Gateway(pb_grpc.GatewayServiceServicer):
    """Keeps uploaded files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def GetFile(self, request: pb.GetFileRequest, context: grpc.ServicerContext) -> pb.GetFileResponse:  # noqa: N802  # gRPC's name
        if request.digest not in self.files:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        return pb.GetFileResponse()

    def UploadFile(  # noqa: N802
        self, requests: Iterator[pb.UploadFileRequest], context: grpc.ServicerContext
    ) -> pb.UploadFileResponse:
        digest = next(requests).digest
        self.files[digest] = b"".join(request.chunk for request in requests)
        return pb.UploadFileResponse()


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def connection(gateway: Gateway) -> Iterator[Connection]:
    with connected(gateway) as found:
        yield found


def config(connection: Connection, **settings: Any) -> run_pb2.RunConfig:
    return execute_call(connection, run_config(RunSettings(model="tiny", dataset="d1", **settings)))


def test_unset_settings_are_not_sent(connection: Connection) -> None:
    """The gateway owns the defaults."""
    assert config(connection) == run_pb2.RunConfig(
        model="models/tiny",
        dataset="datasets/d1",
        search={},
        vae={},
        validity={},
        preflight={},
        mixture={},
    )
    assert config(connection, search={"rounds": None, "strategy": None}) == config(connection)


def test_settings_are_sent_by_name(connection: Connection) -> None:
    """Sections are those of the contract; enums are words, models are ids."""
    sent = config(
        connection,
        seed=7,
        model_version=3,
        search={"radius_sd": 0.7, "strategy": "uniform", "noise": "released", "rounds": 4},
        vae={"epochs": 9},
        validity={"oracle": "strong", "min_typicality": 0.05},
        preflight={"declared_accuracy": 0.97},
        mixture={"min_support": 20},
        validity_from="before",
    )
    assert sent == run_pb2.RunConfig(
        model="models/tiny",
        model_version=3,
        dataset="datasets/d1",
        seed=7,
        search={
            "radius_sd": 0.7,
            "strategy": run_pb2.SearchConfig.STRATEGY_UNIFORM,
            "noise": run_pb2.SearchConfig.NOISE_RELEASED,
            "rounds": 4,
        },
        vae={"epochs": 9},
        validity={"oracle": "models/strong", "min_typicality": 0.05},
        preflight={"declared_accuracy": 0.97},
        mixture={"min_support": 20},
        validity_from="runs/before",
    )


def test_zero_is_sent(connection: Connection) -> None:
    """A check that is disabled by 0 arrives as a set field."""
    validity = config(connection, validity={"min_label_probability": 0, "min_typicality": 0.0}).validity
    assert validity.HasField("min_label_probability")
    assert validity.HasField("min_typicality")
    assert not validity.HasField("max_radius_sd")


def test_encoder_and_decoder_are_uploaded(connection: Connection, gateway: Gateway, tmp_path: Path) -> None:
    """The files are uploaded; the settings hold their digests."""
    for part in ("encoder", "decoder"):
        (tmp_path / part).write_bytes(part.encode())
    sent = config(connection, vae={"encoder": str(tmp_path / "encoder"), "decoder": tmp_path / "decoder"})
    digests = {part: hashlib.sha256(part.encode()).hexdigest() for part in ("encoder", "decoder")}
    assert sent.vae == run_pb2.VaeConfig(encoder_digest=digests["encoder"], decoder_digest=digests["decoder"])
    assert gateway.files == {digest: part.encode() for part, digest in digests.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": {"radius": 0.5}}, "radius"),
        ({"search": {"strategy": "greedy"}}, "GREEDY"),
        ({"search": {"noise": "white"}}, "WHITE"),
        ({"search": {"rounds": "many"}}, "many"),
        ({"validity": {"oracle": "a/b"}}, "a/b"),
        ({"validity_from": "runs/a"}, "runs/a"),
        ({"vae": {"encoder": "/no/such/file"}}, "/no/such/file"),
        ({"mixture": {"min_support": -(2**40)}}, "min_support"),
    ],
)
def test_invalid_settings(connection: Connection, settings: dict[str, Any], message: str) -> None:
    """InvalidInput names an unknown field, enum word or value."""
    with pytest.raises(InvalidInput, match=message):
        config(connection, **settings)
