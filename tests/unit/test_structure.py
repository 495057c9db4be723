"""The structure of the source: sizes of files and functions, import cycles, and names of classes."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

ROOTS = (ROOT / "services", ROOT / "clients" / "python" / "defuse")
# Generated from the contract.
GENERATED = ROOT / "clients" / "python" / "defuse" / "v1"
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 50


def module_name(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    root = ROOT / "clients" / "python" if "clients" in path.relative_to(ROOT).parts else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for root in ROOTS for path in root.rglob("*.py") if GENERATED not in path.parents}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name: str) -> Iterator[str]:
    """Yield the modules of ours that a module imports, at whatever depth the statement stands."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in TREES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imported = submodule if submodule in TREES else node.module
                if imported in TREES and imported != name:
                    yield imported


def test_the_source_is_found() -> None:
    assert {"services.runtime.queue", "services.gateway", "defuse.errors"} <= FILES.keys()


def test_no_file_is_long() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    assert {path: count for path, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}


def test_no_function_is_long() -> None:
    found = {
        f"{module}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {function: count for function, count in found.items() if count > MOST_LINES_OF_A_FUNCTION} == {}


def test_imports_make_no_cycle() -> None:
    sorter = TopologicalSorter({name: set(imports(name)) for name in TREES})
    try:
        sorter.prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_two_public_classes_share_a_name() -> None:
    """The classes of `defuse.aio` are called like those of `defuse`, whose counterparts they are."""
    places = defaultdict(list)
    for module, tree in TREES.items():
        if module.split(".")[:2] != ["defuse", "aio"]:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}
