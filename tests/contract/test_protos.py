"""The contract itself: linted, commented, and what the wheel carries."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def test_buf_lint(protos: Path) -> None:
    """The protos pass buf's STANDARD rules, every message, field and call commented."""
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, "lint"], cwd=protos, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def breaks(protos: Path) -> str:
    """Return what is changed beside the contract of the last release."""
    buf = Path(sys.executable).with_name("buf")
    command = [buf, "breaking", "--against", "released.binpb"]
    return subprocess.run(command, cwd=protos, capture_output=True, text=True, check=False).stdout


def test_what_was_released_stays(protos: Path, tmp_path: Path) -> None:
    """Nothing that other teams may use is taken away; where it were, it would be named."""
    assert breaks(protos) == ""
    changed = tmp_path / "protos"
    shutil.copytree(protos, changed, ignore=shutil.ignore_patterns("__pycache__"))
    file = changed / "defuse" / "v1" / "run.proto"
    file.write_text(file.read_text().replace("  string error_reason = 15;\n", ""))
    assert 'Previously present field "15" with name "error_reason" on message "Run" was deleted' in breaks(changed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a user would build it, with what is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    [found] = out.glob("defuse_ml-*.whl")
    return found


def test_the_wheel_is_the_client(wheel: Path) -> None:
    """The wheel holds the client with its generated stubs, types and templates, and no service."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = ("client.py", "py.typed", "v1/gateway_service_pb2.py", "v1/run_pb2.pyi", "templates/report.html.jinja")
    assert {f"defuse/{name}" for name in expected} <= names
    assert not [name for name in names if name.startswith("services")]


def test_the_client_needs_no_torch() -> None:
    """Importing the client and its command line imports nothing that only the services need."""
    code = (
        "import sys, defuse, defuse.cli\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'sklearn', 'scipy', 'redis', 'tritonclient', 'services'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
