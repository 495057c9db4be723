# ruff: noqa: INP001  # a script beside the package
"""`python -m clients.generate_stubs`: writes `defuse/methods.pyi`.

The stubs come from the tables of calls. Type checkers and editors read signatures and
docstrings of the clients' methods there. A test compares the committed file with
`stubs()`.
"""

import ast
import inspect
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from defuse.calls import CLIENT_CALLS, LATENT_SPACE_CALLS, Call

STUBS = Path(__file__).parent / "python" / "defuse" / "methods.pyi"
_HEAD = '''# Written by `python -m clients.generate_stubs`. Do not edit.
# ruff: noqa: E501, PYI021  # editors show the docstrings
"""Methods of the clients, made from the tables in `defuse.calls`."""
'''
# Class name, table, whether its methods are awaited, and whether they omit the first parameter of a call.
_CLASSES: tuple[tuple[str, Mapping[str, Call], bool, bool], ...] = (
    ("ClientMethods", CLIENT_CALLS, False, False),
    ("AsyncClientMethods", CLIENT_CALLS, True, False),
    ("LatentSpaceMethods", LATENT_SPACE_CALLS, False, True),
    ("AsyncLatentSpaceMethods", LATENT_SPACE_CALLS, True, True),
)


def stubs() -> str:
    """Return the content of `methods.pyi`, formatted."""
    imports: set[str] = {"from collections.abc import AsyncGenerator, Iterator"}
    classes = [
        f"class {name}:\n" + "\n".join(_method(method, call, imports, *flags) for method, call in table.items())
        for name, table, *flags in _CLASSES
    ]
    return _formatted("\n".join([_HEAD, *sorted(imports), *classes]))


def _method(name: str, call: Call, imports: set[str], asynchronous: bool, bound: bool) -> str:
    """Return the stub of a method, and add its imports to `imports`."""
    module = ast.parse(Path(inspect.getfile(call)).read_text(encoding="utf-8"))
    function = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == call.__name__)
    arguments = function.args
    if bound:
        arguments.args.pop(0)
    arguments.args.insert(0, ast.arg("self"))
    # A stub states only simple defaults.
    arguments.defaults = [_simple(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and _simple(default) for default in arguments.kw_defaults]
    kind, result = _result(function.returns)
    imports |= _imports(module, [arguments, result])
    returns = ast.unparse(result)
    if kind == "StreamRpc":
        returns = f"AsyncGenerator[{returns}]" if asynchronous else f"Iterator[{returns}]"
    keyword = "async def" if asynchronous and kind == "SansIoCall" else "def"
    docstring = ast.get_docstring(function, clean=False)
    return f'    {keyword} {name}({ast.unparse(arguments)}) -> {returns}:\n        """{_indented(docstring)}"""\n'


def _simple(default: ast.expr) -> ast.expr:
    return default if isinstance(default, ast.Constant) else ast.Constant(...)


def _result(annotation: ast.expr | None) -> tuple[str, ast.expr]:
    """Return `SansIoCall` or `StreamRpc`, and the type of its result."""
    if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name)):
        raise TypeError(f"a call returns SansIoCall[...] or StreamRpc[...], not {annotation}")
    return annotation.value.id, annotation.slice


def _imports(module: ast.Module, nodes: list[ast.AST]) -> set[str]:
    """Return the imports of a module that bind annotations' names."""
    names = {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}
    found = set()
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) in names:
                    imported = alias.name + (f" as {alias.asname}" if alias.asname else "")
                    origin = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                    found.add(f"{origin}import {imported}")
    return found


def _indented(docstring: str | None) -> str:
    """Return a function's docstring, indented as that of a method."""
    lines = (docstring or "").splitlines(keepends=True)
    return "".join(f"    {line}" if index and line.strip() else line for index, line in enumerate(lines))


def _formatted(text: str) -> str:
    """Return a stub file as ruff formats it, with sorted imports."""
    ruff = str(Path(sys.executable).with_name("ruff"))
    for arguments in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        command = [ruff, *arguments, "--stdin-filename", str(STUBS), "-"]
        text = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout
    return text


if __name__ == "__main__":
    STUBS.write_text(stubs(), encoding="utf-8")
