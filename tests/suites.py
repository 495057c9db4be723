"""Run the parts of `make test` to the end, and print a summary of their results."""

import os
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Niceness of the parts in the background: the scenarios take longest and have priority.
_NICENESS = 5
# Elements of a report, and their words in the summary.
_WORDS = {"failure": "failed", "error": "errors", "passed": "passed", "skipped": "skipped"}
_LEFT_OUT = (
    "tests/more, which needs Debian packages and Node: `make test-more`",
    "a CUDA device, where this machine has none: the same `make test` on a machine with one",
    "images and Compose on a Docker engine: `docker compose up --detach --wait && docker compose run --rm demo`",
)


@dataclass(kw_only=True)
class Part:
    """One target of the Makefile, and its result."""

    name: str
    report: Path
    status: int | None = None
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)

    def run(self, *, log: Path | None = None) -> None:
        """Run the target; in the background if it has a log to write to."""
        options = f"{os.environ.get('PYTEST', '')} --junitxml={self.report}".strip()
        command = ["make", "--no-print-directory", "--keep-going", self.name, f"PYTEST={options}"]
        begin = time.monotonic()
        if log:
            with log.open("w") as file:
                self.status = subprocess.call(["nice", "-n", str(_NICENESS), *command], stdout=file, stderr=file)
        else:
            self.status = subprocess.call(command)
        self.seconds = time.monotonic() - begin
        self._read_report()

    def _read_report(self) -> None:
        try:
            cases = list(ET.parse(self.report).getroot().iter("testcase"))
        except (OSError, ET.ParseError):  # not a run of pytest, or an interrupted one
            return
        for case in cases:
            outcomes = {child.tag: child for child in case if child.tag in {"failure", "error", "skipped"}}
            for tag in outcomes or {"passed": None}:
                self.counts[tag] += 1
            if {"failure", "error"} & set(outcomes):
                self.failures.append(f"{case.get('classname')}::{case.get('name')}")
            if "skipped" in outcomes:
                self.skips[outcomes["skipped"].get("message") or ""] += 1

    @property
    def line(self) -> str:
        counts = ", ".join(f"{self.counts[tag]} {word}" for tag, word in _WORDS.items() if self.counts[tag])
        result = "passed" if self.status == 0 else "FAILED"
        return f"{self.name:10}{result:8}{self.seconds:6.0f} s  {counts}".rstrip()


def main() -> int:
    """Run the scenarios, and the other parts one after the other beside them; return the exit status."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        parts = [Part(name=name, report=directory / f"{name}.xml") for name in ("lint", "unit", "contract", "scenario")]
        *background, scenario = parts

        def run_background() -> None:
            for part in background:
                log = directory / f"{part.name}.log"
                part.run(log=log)
                _print(f"\n==== {part.name} ====\n{log.read_text(errors='replace')}")

        thread = threading.Thread(target=run_background)
        thread.start()
        scenario.run()
        thread.join()
        _print(_summary(parts, time.monotonic() - begin))
    return int(any(part.status != 0 for part in parts))


def _summary(parts: Sequence[Part], seconds: float) -> str:
    skips = [f"{part.name}: {count} skipped: {why}" for part in parts for why, count in part.skips.items()]
    return "\n".join(
        [
            "\n==== summary ====",
            *(part.line for part in parts),
            f"{'all':10}{'passed' if all(part.status == 0 for part in parts) else 'FAILED':8}{seconds:6.0f} s",
            *(f"FAILED {failure}" for part in parts for failure in part.failures),
            *(f"FAILED {part.name}, see its output above" for part in parts if part.status and not part.failures),
            "\nNot run:",
            *(f"- {one}" for one in (*skips, *_LEFT_OUT)),
        ]
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
