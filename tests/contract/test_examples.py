"""The examples in docs/reference/api.md, run as they stand against a real gateway."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from defuse.v1 import generator_service_pb2_grpc, model_pb2, region_pb2, release_pb2, run_pb2

from services.storage import keys
from tests.conftest import ROOT
from tests.gateway_process import Door, running_gateway
from tests.unit.client.test_client import BATCHES, Generator

DIGITS = model_pb2.Model(name="models/digits", classes=map(str, range(10)), image_shape=[28, 28, 1])
RUN = run_pb2.Run(name="runs/first", state=run_pb2.Run.STATE_SUCCEEDED)
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def door(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A gateway before a generator; the run `first` has ended, with one region."""
    generator = grpc.server(futures.ThreadPoolExecutor(2))
    generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(Generator(), generator)
    address = f"127.0.0.1:{generator.add_insecure_port('127.0.0.1:0')}"
    generator.start()
    with running_gateway(tmp_path_factory.mktemp("gateway"), redis_server, DEFUSE_GENERATOR_URL=address) as found:
        found.plant(RUN)
        found.store.write_message(keys.run(RUN.name), RUN)
        region = region_pb2.Region(name="runs/first/regions/r1", true_label="ant", predicted_label="bee")
        found.store.write_message(keys.model(DIGITS.name), DIGITS)
        found.store.write_message(f"{keys.releases(DIGITS.name)}/1.pb", release_pb2.Release(version=1))
        found.store.write_message(keys.distillation(RUN.name), region_pb2.Distillation(regions=[region]))
        yield found
    generator.stop(None).wait()


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("gateway_service", "r1 ant taken for bee"),
        ("generator_service", f"1 more failures; goes on from {BATCHES}"),
        ("monitor_service", "2 stored\n1 labelled"),
        ("operations", "done"),
    ],
)
def test_an_example(door: Door, redis_server: str, example: str, expected: str) -> None:
    """It ends well and prints what is there."""
    path = ROOT / "docs" / "examples" / f"{example}.py"
    environment = {**os.environ, "DEFUSE_GATEWAY": door.address}
    done = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


def test_every_example_is_run() -> None:
    """There is none beside those above."""
    assert {path.stem for path in Path(ROOT / "docs" / "examples").glob("*.py")} == {
        "gateway_service",
        "generator_service",
        "monitor_service",
        "operations",
    }
