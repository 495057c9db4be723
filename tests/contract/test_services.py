"""What every service process promises: health that is true, reflection, and an end when it is asked to."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.conftest import ROOT, running_stack

SERVICES = {"generator": "Generator", "distiller": "Distiller", "corrector": "Corrector", "gateway": "Gateway"}


@pytest.fixture(params=SERVICES)
def lonely(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, "subprocess.Popen[str]"]]:
    """A service whose Redis and Triton are not there: its name, address and process."""
    environment = {
        **os.environ,
        "DEFUSE_REDIS_URL": "redis://127.0.0.1:9/0",
        "DEFUSE_TRITON_URL": "127.0.0.1:9",
        "DEFUSE_STORE_URL": f"file://{tmp_path}/store",
        "DEFUSE_TRITON_REPOSITORY": str(tmp_path / "models"),
    }
    command = [sys.executable, "-m", f"services.{request.param}"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = next(json.loads(line)["address"] for line in process.stderr if '"listening"' in line)
        yield request.param, address, process
        process.kill()


def test_a_service_without_its_servers(lonely: tuple[str, str, "subprocess.Popen[str]"]) -> None:
    """It is NOT_SERVING and says why, answers reflection, and ends on SIGTERM."""
    name, address, process = lonely
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
        listed = {service.name for service in answer.list_services_response.service}
    assert f"defuse.v1.{SERVICES[name]}Service" in listed
    assert process.stderr
    faults = next(json.loads(line)["faults"] for line in process.stderr if '"health"' in line)
    assert any("Redis at redis://127.0.0.1:9/0 does not answer" in fault for fault in faults)
    assert any("Triton at 127.0.0.1:9" in fault for fault in faults)
    process.terminate()
    assert process.wait(30) == 0


def test_nothing_outlives_the_stack(tmp_path: Path) -> None:
    """Kill -9 of the stack ends Redis, Triton, its stubs and all services."""
    stack = running_stack(tmp_path)
    with stack as found:
        pids = list(found.state["pids"].values())
        stack.process.kill()
        stack.process.wait(10)
        deadline_s = 60
        for pid in pids:
            _gone(pid, deadline_s)


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


def _gone(pid: int, within_s: float) -> None:
    from tests.conftest import eventually

    eventually(lambda: not Path(f"/proc/{pid}").exists(), within_s=within_s)
