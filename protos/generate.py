"""Compile `protos/` into `clients/python/defuse/v1`: modules, gRPC stubs and their types.

Runs as a hatch build hook during `pip install` and `pip wheel`, and by hand after a `.proto` changed:
`python protos/generate.py`. The path below `protos/` equals the Python import path, so nothing is rewritten.
"""

import importlib.resources
import os
import sys
from pathlib import Path
from typing import Any

from grpc_tools import protoc

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, without the build back end
    BuildHookInterface = object

PROTOS = Path(__file__).parent.resolve()
CLIENT = PROTOS.parent / "clients" / "python"


def generate() -> None:
    """Compile every `.proto`; raise RuntimeError when the compiler refuses one (it says why on standard error)."""
    # protoc looks for its plugins on the PATH, where an environment that was not activated is missing.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    (CLIENT / "defuse" / "v1").mkdir(parents=True, exist_ok=True)
    (CLIENT / "defuse" / "v1" / "__init__.py").touch()
    outputs = [f"--{kind}_out={CLIENT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    compile_protos(*outputs)


def compile_protos(*options: str) -> None:
    """Run the compiler on every `.proto`; raise RuntimeError when it refuses one."""
    includes = [PROTOS, Path(str(importlib.resources.files("grpc_tools"))) / "_proto"]
    files = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.glob("defuse/**/*.proto"))]
    code = protoc.main(["protoc", *(f"--proto_path={path}" for path in includes), *options, *files])
    if code:
        raise RuntimeError(f"protoc ended with status {code}")


class ProtoBuildHook(BuildHookInterface):  # type: ignore[misc]  # hatchling is absent outside a build
    """Lets hatch compile the protos before it packs or links the client."""

    PLUGIN_NAME = "protos"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # hatch's signature
        generate()


if __name__ == "__main__":
    generate()
