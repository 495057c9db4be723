"""docs/reference/settings.md lists the settings of the services."""

from pathlib import Path

from docs.settings_table import settings_table

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"


def test_the_documented_settings_are_the_settings() -> None:
    """The list in the documentation is the generated one: `python -m docs.settings_table`."""
    assert settings_table() in PAGE.read_text()
