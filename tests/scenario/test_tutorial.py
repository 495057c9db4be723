"""The commands of the tutorial, run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Stack
from tests.planted import Planted

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


@pytest.mark.usefixtures("undisturbed")
def test_the_commands_of_the_tutorial(stack: Stack, planted: Planted, workdir: Path) -> None:
    """A user who copies the tutorial's commands, with files of those names, completes the walk."""
    shutil.copy(planted.onnx, workdir / "digits.onnx")
    shutil.copy(planted.data, workdir / "digits.npz")
    [commands] = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    environment = {
        **os.environ,
        "DEFUSE_GATEWAY": stack.gateway,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (workdir / "first-r1.png").exists()
    assert (workdir / "report" / "report.html").exists()
    assert (workdir / "report" / "report.json").exists()
