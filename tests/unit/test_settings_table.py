"""docs/operations.md names the settings that there are."""

from pathlib import Path

from services.settings_table import settings_table

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_documented_settings_are_the_settings() -> None:
    """The table in the documentation is the generated one: `python -m services.settings_table`."""
    assert settings_table() in OPERATIONS.read_text()
