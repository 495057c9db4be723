"""A failed start of a service prints one line for its operator, not a traceback."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAKE = ROOT / "deploy" / "make-certificates.sh"
# A port that is taken gRPC mentions in a line of its own.
_OF_GRPC = re.compile(r"E\d{4} ")
# Runs a service where a package for traces is missing.
WITHOUT_TRACES = (
    "import runpy, sys\n"
    "sys.modules['opentelemetry.instrumentation.grpc'] = None\n"
    "runpy.run_module('services.gateway', run_name='__main__')"
)


def started(*arguments: str, **variables: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a service with these `DEFUSE_*` variables and no others, until it ends by itself."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFUSE_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | {f"DEFUSE_{name}": str(value) for name, value in variables.items()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def assert_one_line(done: "subprocess.CompletedProcess[str]", status: int, *said: str) -> None:
    assert done.returncode == status, done.stderr
    [line] = [line for line in done.stderr.splitlines() if not _OF_GRPC.match(line)]
    assert all(words in line for words in said), line


@pytest.fixture
def taken() -> Iterator[int]:
    """Give a port on which somebody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("service", ["generator", "distiller", "corrector", "gateway"])
def test_a_service_for_strangers(service: str, tmp_path: Path) -> None:
    """No service listens beyond this host to callers that it cannot tell apart."""
    done = started("-m", f"services.{service}", HOST="0.0.0.0", STORE_URL=f"file://{tmp_path}")
    assert_one_line(done, 2, "DEFUSE_HOST", "DEFUSE_ALLOW_ANONYMOUS")


def test_tokens_that_are_no_use(tmp_path: Path) -> None:
    """The line of the file is named."""
    (tmp_path / "tokens").write_text("ann admin secret\n")
    done = started("-m", "services.gateway", TOKENS_FILE=tmp_path / "tokens", STORE_URL=f"file://{tmp_path}")
    assert_one_line(done, 1, f"{tmp_path / 'tokens'}, line 1", "NAME ROLE DIGEST")


@pytest.mark.openssl
def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    """Both files are named."""
    subprocess.run([MAKE, tmp_path], check=True, capture_output=True)
    certificate, key = tmp_path / "gateway" / "certificate.pem", tmp_path / "client" / "key.pem"
    done = started("-m", "services.gateway", TLS_CERTIFICATE=certificate, TLS_KEY=key, STORE_URL=f"file://{tmp_path}")
    assert_one_line(done, 1, str(certificate), str(key))


def test_a_package_for_traces_that_is_missing(tmp_path: Path) -> None:
    """The command that installs it is named."""
    done = started("-c", WITHOUT_TRACES, OTLP_URL="http://127.0.0.1:9", STORE_URL=f"file://{tmp_path}")
    assert_one_line(done, 1, "DEFUSE_OTLP_URL", "pip install 'defuse-ml[tracing]'")


@pytest.mark.parametrize("setting", ["PORT", "METRICS_PORT"])
def test_a_port_that_is_taken(setting: str, taken: int, tmp_path: Path) -> None:
    """Port and setting are named."""
    variables = {setting: str(taken), "STORE_URL": f"file://{tmp_path}"}
    assert_one_line(
        started("-m", "services.gateway", **variables), 1, f"127.0.0.1:{taken}", f"is DEFUSE_{setting} taken?"
    )
