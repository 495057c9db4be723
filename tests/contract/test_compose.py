"""Each service starts with the command and the variables that the compose file gives it."""

import subprocess
import sys
from pathlib import Path

import pytest
from defuse.tls import TlsFiles

from services.localstack.child_process import free_port
from services.runtime.health import is_healthy
from services.triton.client import InferenceClient
from tests import composed
from tests.conftest import ROOT, eventually

SERVICES = ("generator", "distiller", "corrector", "gateway")
# Where the volumes are mounted.
VOLUMES = "/var/lib/defuse"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_the_compose_file(name: str, redis_url: str, inference: InferenceClient, tmp_path: Path) -> None:
    """It becomes healthy, but for what lies elsewhere here: servers, volumes and ports."""
    variables = {key: value.replace(VOLUMES, str(tmp_path)) for key, value in composed.environment(name).items()}
    port = variables["DEFUSE_PORT"] = str(free_port())
    variables |= {
        "DEFUSE_METRICS_PORT": str(free_port()),
        "DEFUSE_REDIS_URL": redis_url,
        "DEFUSE_TRITON_URL": inference.url,
    }
    arguments = composed.commands()[name][1:]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([sys.executable, *arguments], env=variables, cwd=ROOT, stderr=log, stdout=log) as process,
    ):
        try:
            eventually(lambda: is_healthy(f"127.0.0.1:{port}", TlsFiles()), alive=process)
            health = subprocess.run(
                [sys.executable, "-m", "services.runtime.health"], env={"DEFUSE_PORT": port}, cwd=ROOT, check=False
            )
            assert health.returncode == 0
        finally:
            process.terminate()
    assert process.returncode == 0
