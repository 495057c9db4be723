import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINT = """
from services.runtime.settings import Settings
settings = Settings.load()
print(settings.port, settings.host, settings.log_level)
"""


def load(**variables: str) -> "subprocess.CompletedProcess[str]":
    """Load the settings in a process of its own, with these `DEFUSE_*` variables and no others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEFUSE_")}
    return subprocess.run(
        [sys.executable, "-c", PRINT],
        env=clean | {f"DEFUSE_{name}": value for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_bad_variables_end_the_process_by_name() -> None:
    """Every variable that is not valid is named in a line of its own with what it was, and the process ends with 2."""
    ended = load(PORT="seventy", CLAIM_AFTER_S="-1", LOG_LEVEL="LOUD")
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = ended.stderr.splitlines()
    assert len(lines) == 3
    for name, value in (("PORT", "seventy"), ("CLAIM_AFTER_S", "-1"), ("LOG_LEVEL", "LOUD")):
        [line] = [line for line in lines if line.startswith(f"DEFUSE_{name}: ")]
        assert value in line


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    """The file that `DEFUSE_SETTINGS_FILE` names is read, a variable wins over it, and the rest are defaults."""
    file = tmp_path / "settings.toml"
    file.write_text('port = 7001\nhost = "127.0.0.2"\n')
    assert load(SETTINGS_FILE=str(file), PORT="7002").stdout == "7002 127.0.0.2 INFO\n"


def test_a_settings_file_that_is_not_there() -> None:
    """A missing file is named."""
    ended = load(SETTINGS_FILE="/no/such.toml")
    assert ended.returncode == 2
    assert ended.stderr == "DEFUSE_SETTINGS_FILE: there is no file '/no/such.toml'\n"


def test_a_settings_file_that_is_no_toml(tmp_path: Path) -> None:
    """A file that cannot be read is named in one line, too."""
    file = tmp_path / "settings.toml"
    file.write_text("port 7001\n")
    ended = load(SETTINGS_FILE=str(file))
    assert ended.returncode == 2
    assert ended.stderr.startswith("DEFUSE_SETTINGS_FILE: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "::1", "[::1]"])
def test_this_host_alone_needs_no_credentials(host: str) -> None:
    assert load(HOST=host).stdout == f"0 {host} INFO\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "[::]", "gateway.example.org"])
def test_strangers_are_not_listened_to(host: str) -> None:
    """Beyond this host a service listens to callers that it can tell apart; otherwise one line says what to do."""
    ended = load(HOST=host)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"DEFUSE_HOST: anyone who reaches {host} could do everything")
    for way in ("DEFUSE_TLS_AUTHORITY", "DEFUSE_TOKENS_FILE", "127.0.0.1", "DEFUSE_ALLOW_ANONYMOUS=true"):
        assert way in line


def test_who_may_listen_to_strangers(tmp_path: Path) -> None:
    """With an authority callers have certificates; a network can be declared private. TLS alone knows nobody."""
    (tmp_path / "any.pem").touch()
    pair = {"TLS_CERTIFICATE": str(tmp_path / "any.pem"), "TLS_KEY": str(tmp_path / "any.pem")}
    assert load(HOST="0.0.0.0", ALLOW_ANONYMOUS="true").returncode == 0
    assert load(HOST="0.0.0.0", TLS_AUTHORITY=str(tmp_path / "any.pem"), **pair).returncode == 0
    assert load(HOST="0.0.0.0", **pair).returncode == 2
