"""The promises of every service process: true health, reflection, and an end on request."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from defuse import Client, StoreFull, Unavailable
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.conftest import ROOT, eventually, running_stack

TIMEOUT_S = 60
Start = Callable[[str], tuple[str, "subprocess.Popen[str]"]]
SERVICES = {"generator": "Generator", "distiller": "Distiller", "corrector": "Corrector", "gateway": "Gateway"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a service whose Redis and Triton are not there; give its address and process."""
    environment = {
        **os.environ,
        "DEFUSE_REDIS_URL": "redis://127.0.0.1:9/0",
        "DEFUSE_TRITON_URL": "127.0.0.1:9",
        "DEFUSE_STORE_URL": f"file://{tmp_path}/store",
        "DEFUSE_TRITON_REPOSITORY": str(tmp_path / "models"),
    }
    with contextlib.ExitStack() as stack:

        def started(name: str) -> tuple[str, "subprocess.Popen[str]"]:
            command = [sys.executable, "-m", f"services.{name}"]
            process = stack.enter_context(
                subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stderr
            return next(json.loads(line)["address"] for line in process.stderr if '"listening"' in line), process

        yield started


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_without_its_servers(start: Start, name: str) -> None:
    """It is NOT_SERVING and says why, answers reflection, and ends on SIGTERM."""
    address, process = start(name)
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request]), timeout=TIMEOUT_S
        )
        listed = {service.name for service in answer.list_services_response.service}
    assert f"defuse.v1.{SERVICES[name]}Service" in listed
    assert process.stderr
    faults = next(json.loads(line)["faults"] for line in process.stderr if '"health"' in line)
    assert any("Redis at redis://127.0.0.1:9/0 does not answer" in fault for fault in faults)
    assert any("Triton at 127.0.0.1:9" in fault for fault in faults)
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0


def test_redis_that_is_down_is_named_to_the_caller(start: Start) -> None:
    """A call that needs Redis is refused with where it should be; it can be made again."""
    address, _ = start("gateway")
    with Client(address) as client, pytest.raises(Unavailable, match=r"Redis.*127\.0\.0\.1:9") as refused:
        client.runs()
    assert refused.value.reason == "REDIS_UNAVAILABLE"


def test_a_full_disk_is_named_to_the_caller(start: Start, tmp_path: Path) -> None:
    """An upload into a store without room is refused with what to do, and leaves nothing behind."""
    address, process = start("gateway")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    np.savez(tmp_path / "images.npz", x_train=np.zeros((100, 28, 28), np.uint8), y_train=np.arange(100) % 10)
    with Client(address) as client, pytest.raises(StoreFull, match=r"has no room.*free space") as refused:
        client.add_dataset(tmp_path / "images.npz")
    assert str(tmp_path / "store") in refused.value.message
    assert not list((tmp_path / "store" / "files").iterdir())


def test_nothing_outlives_the_stack(tmp_path: Path) -> None:
    """Kill -9 of the stack ends Redis, Triton, its stubs and all services."""
    stack = running_stack(tmp_path)
    with stack as found:
        pids = list(found.state["pids"].values())
        stack.process.kill()
        stack.process.wait(TIMEOUT_S)
        for pid in pids:
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_second_stack_in_the_same_directory(tmp_path: Path) -> None:
    """Two stacks in one directory would share their data: the second is refused."""
    with running_stack(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "services"],
            env={**os.environ, "DEFUSE_HOME": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "another stack uses" in done.stderr
