"""TLS by files: callers without a certificate are rejected, and renewed files are used without a restart."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from defuse import Client, DeadlineExceeded, DefuseError, Unavailable

from services.localstack.child_process import free_port
from tests.conftest import ROOT, eventually

MAKE = ROOT / "deploy" / "make-certificates.sh"
pytestmark = pytest.mark.openssl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities and their certificates, in `old` and `new`."""
    root = tmp_path_factory.mktemp("certificates")
    for name in ("old", "new"):
        subprocess.run([MAKE, root / name], check=True, capture_output=True)
    return root


def variables(directory: Path) -> dict[str, str]:
    files = {"CERTIFICATE": "certificate.pem", "KEY": "key.pem", "AUTHORITY": "authority.pem"}
    return {f"DEFUSE_TLS_{part}": str(directory / file) for part, file in files.items()}


@pytest.fixture
def gateway(made: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A gateway that listens with TLS; give its address and the directory of its files."""
    files = tmp_path / "certificates"
    shutil.copytree(made / "old" / "gateway", files)
    environment = {
        **os.environ,
        **variables(files),
        "DEFUSE_REDIS_URL": "redis://127.0.0.1:9/0",
        "DEFUSE_TRITON_URL": "grpcs://127.0.0.1:9",
        "DEFUSE_STORE_URL": f"file://{tmp_path}/store",
    }
    port = environment["DEFUSE_PORT"] = str(free_port())
    command = [sys.executable, "-m", "services.gateway"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log) as process,
    ):
        eventually(lambda: "listening" in (tmp_path / "log").read_text(), alive=process)
        yield f"grpcs://localhost:{port}", files
        process.kill()


def answers(address: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> bool:
    """Say whether a client with these variables, and no others, gets an answer."""
    with monkeypatch.context() as patch:
        for part in ("CERTIFICATE", "KEY", "AUTHORITY"):
            patch.delenv(f"DEFUSE_TLS_{part}", raising=False)
        for name, value in given.items():
            patch.setenv(name, value)
        with Client(address, timeout_s=30) as client:
            try:
                return bool(client.version())
            except (Unavailable, DeadlineExceeded):
                return False


def test_both_sides_show_who_they_are(gateway: tuple[str, Path], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of the authority is answered; not one without a certificate, of another authority, or without TLS."""
    address, _ = gateway
    client = variables(made / "old" / "client")
    assert answers(address, monkeypatch, client)
    assert not answers(address, monkeypatch, {"DEFUSE_TLS_AUTHORITY": client["DEFUSE_TLS_AUTHORITY"]})
    assert not answers(address, monkeypatch, variables(made / "new" / "client"))
    assert not answers(address.removeprefix("grpcs://"), monkeypatch, {})


def test_a_certificate_that_has_expired(
    gateway: tuple[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, though its authority is trusted."""
    authority, files = made / "old", tmp_path / "expired"
    shutil.copytree(authority / "client", files)
    request = ["openssl", "req", "-new", "-key", files / "key.pem", "-subj", "/CN=client", "-out", files / "request"]
    sign = ["openssl", "x509", "-req", "-in", files / "request", "-CA", authority / "authority.pem"]
    sign += ["-CAkey", authority / "authority.key", "-CAcreateserial", "-days", "-1", "-out", files / "certificate.pem"]
    for command in (request, sign):
        subprocess.run(command, check=True, capture_output=True)
    address, _ = gateway
    assert not answers(address, monkeypatch, variables(files))
    assert answers(address, monkeypatch, variables(authority / "client"))


def test_renewed_files_are_taken(gateway: tuple[str, Path], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the files were replaced, clients of the new authority are answered and those of the old one are not."""
    address, files = gateway
    for file in (made / "new" / "gateway").iterdir():
        shutil.copy(file, files / file.name)
    new, old = (variables(made / name / "client") for name in ("new", "old"))
    eventually(lambda: answers(address, monkeypatch, new))
    assert not answers(address, monkeypatch, old)


def test_a_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFUSE_TLS_AUTHORITY", "/nowhere/authority.pem")
    with pytest.raises(DefuseError, match="DEFUSE_TLS_AUTHORITY: /nowhere/authority"):
        Client("grpcs://localhost:1")
