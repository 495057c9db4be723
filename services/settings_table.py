"""The table of all settings for docs/operations.md: `python -m services.settings_table`."""

import sys
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from services.corrector.__main__ import CorrectorSettings
from services.dependencies import TransportSettings
from services.gateway.settings import GatewaySettings
from services.generator.__main__ import GeneratorSettings
from services.localstack.stack import StackSettings
from services.runtime.settings import PREFIX, Settings

_OWN: dict[str, type[BaseSettings]] = {
    "generator": GeneratorSettings,
    "distiller": TransportSettings,
    "corrector": CorrectorSettings,
    "gateway": GatewaySettings,
    "the local stack": StackSettings,
}


def settings_table() -> str:
    """Return the settings of every service as a Markdown table.

    Those of all services come first.
    """
    rows = [_row(name, "every service", Settings) for name in Settings.model_fields]
    for owner, cls in _OWN.items():
        rows += [_row(name, owner, cls) for name in cls.model_fields if _is_own(name, cls)]
    return "\n".join(["| variable | of | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _is_own(name: str, cls: type[BaseSettings]) -> bool:
    """Return whether a setting, or its default, is the service's own."""
    common = Settings.model_fields.get(name)
    return common is None or common.default != cls.model_fields[name].default


def _row(name: str, owner: str, cls: type[BaseSettings]) -> str:
    field = cls.model_fields[name]
    shown = "" if field.default is None else f"`{_default(field.default)}`"
    return f"| `{PREFIX}{name.upper()}` | {owner} | {shown} | {field.description} |"


def _default(value: Any) -> str:
    return str(value).replace(str(Path.home()), "~")


if __name__ == "__main__":
    sys.stdout.write(f"{settings_table()}\n")
