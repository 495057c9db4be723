"""The contract from another language: Node, with gRPC's own client and the protos as they are."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import defuse
import grpc
from defuse.v1 import run_pb2, work_pb2
from google.rpc import code_pb2

from tests.conftest import ROOT
from tests.gateway_process import running_gateway

PACKAGES = ROOT / ".venv" / "more" / "node" / "node_modules"
PROTOS = [ROOT / "protos", Path(sysconfig.get_path("purelib"))]  # ours, and Google's


def test_node_waits_for_an_operation(redis_url: str, tmp_path: Path) -> None:
    """The gateway answers, refuses with a status, and reports the end of a search."""
    node = shutil.which("node")
    assert node, "Node is missing: `make test-more` installs it"
    assert PACKAGES.is_dir(), "packages of Node are missing: `make test-more` installs them"
    name = "runs/first/operations/search"
    with running_gateway(tmp_path, redis_url) as door:
        door.plant(run_pb2.Run(name="runs/first", state=run_pb2.Run.STATE_PREPARING))
        command = [node, ROOT / "tests" / "more" / "wait_for_operation.cjs", door.address, name, *PROTOS]
        with subprocess.Popen(
            command, env={**os.environ, "NODE_PATH": str(PACKAGES)}, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            version, refused = (json.loads(process.stdout.readline()) for _ in range(2))
            door.tell(work_pb2.Event(subject="runs/first", failed={"error": "mush", "reason": "VAE_TOO_COARSE"}))
            ended = json.loads(process.stdout.readline())
    assert version["version"] == defuse.__version__
    assert (refused["code"], "search-of-nobody" in refused["details"]) == (grpc.StatusCode.NOT_FOUND.value[0], True)
    assert ended["metadata"]["type_url"].endswith("/defuse.v1.OperationMetadata")
    assert (ended["name"], ended["error"]["code"], ended["error"]["message"]) == (
        name,
        code_pb2.FAILED_PRECONDITION,
        "mush",
    )
