"""The summary of `make test`, on planted targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Stands in for `make`: its third argument is the target, and its fourth ends with the report's path.
MAKE = """#!/bin/sh
echo "output of $3"
report=${4##*=}
case "$3" in
  $FAILING) body='<failure message="m"/>'; status=1 ;;
  $BROKEN) exit 2 ;;
  *) body='<skipped message="needs a CUDA device"/>'; status=0 ;;
esac
echo "<testsuite><testcase classname='a' name='x'/>" > "$report"
echo "<testcase classname='b' name='y'>$body</testcase></testsuite>" >> "$report"
exit $status
"""


@pytest.mark.parametrize(
    ("failing", "broken"), [("nothing", "nothing"), ("unit", "lint"), ("contract", "scenario"), ("scenario", "unit")]
)
def test_every_part_is_run_and_named(tmp_path: Path, failing: str, broken: str) -> None:
    """A failing part stops no other; the summary has each result, failed tests and skipped ones."""
    program = tmp_path / "make"
    program.write_text(MAKE)
    program.chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAILING": failing, "BROKEN": broken}
    done = subprocess.run(
        [sys.executable, "-m", "tests.suites"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    summary = lines[lines.index("==== summary ====") + 1 :]
    parts = ("lint", "unit", "contract", "scenario")
    assert all(f"output of {part}" in lines for part in parts)
    assert [line.split()[:2] for line in summary[:4]] == [
        [part, "FAILED" if part in {failing, broken} else "passed"] for part in parts
    ]
    assert done.returncode == int(failing in parts)
    assert ("FAILED b::y" in summary) is (failing in parts)
    assert (f"FAILED {broken}, see its output above" in summary) is (broken in parts)
    skipped = [part for part in parts if part not in {failing, broken}]
    assert [line for line in summary if "CUDA device" in line and "skipped" in line] == [
        f"- {part}: 1 skipped: needs a CUDA device" for part in skipped
    ]
    assert any("make test-more" in line for line in summary)
