"""The parts of a benchmark, measured one after the other, each told as soon as it is known."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Section = Callable[[], dict[str, Any]]


def add_only(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Let a caller choose among the sections; all are measured otherwise."""
    choices = list(names)
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="measure only these sections")


def measured(sections: Mapping[str, Section], only: Iterable[str]) -> dict[str, Any]:
    """Measure sections in their order; return what all of them found."""
    chosen = set(only)
    figures: dict[str, Any] = {}
    for name, section in sections.items():
        if name in chosen:
            begin = time.perf_counter()
            found = section()
            print(f"{name}: {json.dumps(found)} ({time.perf_counter() - begin:.0f} s)", flush=True)
            figures |= found
    return figures
