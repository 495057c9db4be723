"""The compose files as Compose reads them: anchors resolved, env files read, overlays merged."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.conftest import ROOT

BASE = "docker-compose.yml"
OVERLAYS = ("deploy/compose.gpu.yaml", "deploy/compose.observe.yaml", "deploy/compose.tls.yaml")
_STAGE = re.compile(r"^FROM \S+ AS (\S+)$(.*?)(?=^FROM |\Z)", re.MULTILINE | re.DOTALL)
_CMD = re.compile(r"^(?:CMD|ENTRYPOINT) (\[.*\])$", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Knows Compose's `!reset`, by which an overlay takes something away."""


_Loader.add_constructor("!reset", lambda *_: None)


def read(file: str) -> Any:
    return yaml.load((ROOT / file).read_text(), _Loader)


def services(file: str = BASE) -> dict[str, Any]:
    found: dict[str, Any] = read(file)["services"]
    return found


def environment(name: str, *files: str) -> dict[str, str]:
    """Return the variables that a service gets of the base file and of overlays."""
    found: dict[str, str] = {}
    for file in (BASE, *files):
        service = services(file).get(name, {})
        if env_file := service.get("env_file"):
            found |= _variables(env_file)
        found |= {key: str(value) for key, value in service.get("environment", {}).items()}
    return found


def commands() -> Mapping[str, list[str]]:
    """Return what each target of the Dockerfile runs."""
    stages = _STAGE.findall((ROOT / "deploy" / "Dockerfile").read_text())
    found = {name: _CMD.findall(text) for name, text in stages}
    return {name: yaml.safe_load(command[-1]) for name, command in found.items() if command}


def _variables(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
