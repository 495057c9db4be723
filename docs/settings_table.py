"""`python -m docs.settings_table`: all settings, for docs/reference/settings.md."""

import sys
import textwrap
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from services.corrector.__main__ import CorrectorSettings
from services.dependencies import TransportSettings
from services.gateway.settings import GatewaySettings
from services.generator.__main__ import GeneratorSettings
from services.localstack.stack import StackSettings
from services.runtime.settings import PREFIX, Settings

_WIDTH = 120
_OWN: dict[str, type[BaseSettings]] = {
    "Generator": GeneratorSettings,
    "Distiller": TransportSettings,
    "Corrector": CorrectorSettings,
    "Gateway": GatewaySettings,
    "The local stack": StackSettings,
}


def settings_table() -> str:
    """Return the settings of every service as Markdown lists.

    The settings that all services share come first.
    """
    parts = [_section("Every service", Settings, list(Settings.model_fields))]
    for title, cls in _OWN.items():
        parts.append(_section(title, cls, [name for name in cls.model_fields if _is_own(name, cls)]))
    return "\n".join(parts)


def _section(title: str, cls: type[BaseSettings], names: list[str]) -> str:
    return f"## {title}\n\n" + "".join(_item(name, cls) for name in names)


def _is_own(name: str, cls: type[BaseSettings]) -> bool:
    """Return whether a setting, or its default, is the service's own."""
    common = Settings.model_fields.get(name)
    return common is None or common.default != cls.model_fields[name].default


def _item(name: str, cls: type[BaseSettings]) -> str:
    field = cls.model_fields[name]
    text = f"- `{PREFIX}{name.upper()}` ({_default(field.default)}): {field.description}"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n"


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    shown = str(value).replace(str(Path.home()), "~")
    return f"default `{shown}`" if shown else "default empty"


if __name__ == "__main__":
    sys.stdout.write(settings_table())
