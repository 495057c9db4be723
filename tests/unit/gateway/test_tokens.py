"""Tokens in a file: known by their digests, read again when it changes, made by a command."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from defuse.errors import InvalidInput
from defuse.v1 import access_pb2

from services.gateway import tokens
from services.gateway.access.roles import Caller
from services.gateway.tokens import Tokens, line_of, new_token, read_tokens
from tests.conftest import ROOT

ANN = Caller(name="ann", role=access_pb2.ROLE_ANNOTATOR)
BOB = Caller(name="bob", role=access_pb2.ROLE_ADMIN)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a token of Ann's."""
    (tmp_path / "tokens").write_text(f"# of our team\n\n{line_of('ann', 'annotator', 'first')}\n")
    return tmp_path / "tokens"


@pytest.fixture(autouse=True)
def looked_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_LOOK_EVERY_S", 0.0)


def test_a_token_is_somebodys(file: Path) -> None:
    """A token finds its caller, repeatedly; an unknown token, or a digest, does not."""
    known = Tokens(file)
    assert [known.caller("first"), known.caller("first"), known.caller("second")] == [ANN, ANN, None]
    assert known.caller(tokens.digest_of("first")) is None


def test_a_new_token_replaces_an_old_one(file: Path) -> None:
    """A name has both for a while, and the old one is refused as soon as its line is gone."""
    known = Tokens(file)
    old = file.read_text()
    file.write_text(f"{old}{line_of('ann', 'annotator', 'second')}\n")
    assert [known.caller("first"), known.caller("second")] == [ANN, ANN]
    file.write_text(f"{line_of('ann', 'annotator', 'second')}\n")
    assert [known.caller("first"), known.caller("second")] == [None, ANN]


@pytest.mark.parametrize("broken", ["nonsense\n", None], ids=["no lines of tokens", "missing"])
def test_a_file_that_is_no_use_changes_nothing(
    file: Path, broken: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Callers keep their tokens until it is mended; the log says it once."""
    known = Tokens(file)
    file.write_text(broken) if broken else file.unlink()
    assert [known.caller("first"), known.caller("first")] == [ANN, ANN]
    assert capsys.readouterr().out.count("tokens_not_renewed") == 1
    file.write_text(f"{line_of('bob', 'admin', 'third')}\n")
    assert [known.caller("first"), known.caller("third")] == [None, BOB]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ann annotator", "is not NAME ROLE DIGEST"),
        ("ann annotator secret", "is not NAME ROLE DIGEST"),
        (f"ann annotator {'0' * 64} more", "is not NAME ROLE DIGEST"),
        (f"ann king {'0' * 64}", "no role 'king'; use one of viewer, annotator, operator, admin"),
        (f"../ann admin {'0' * 64}", "caller id '../ann' is refused"),
    ],
)
def test_a_line_that_is_no_use_is_named(file: Path, line: str, why: str) -> None:
    """By file and number, with what it should be."""
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(InvalidInput, match=rf"{file}, line 4: .*{re.escape(why)}"):
        read_tokens(file)


def test_no_two_tokens_are_alike() -> None:
    """A token is long, and says what it is."""
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"defuse_[\w-]{43}", token) for token in made)


def command(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    run = [sys.executable, "-m", "services.gateway.tokens", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_makes_a_token(tmp_path: Path) -> None:
    """It prints the token once; the file, for its owner alone, has the digest only, and what it had before."""
    file = tmp_path / "tokens"
    made = [command(file, name, role).stdout.strip() for name, role in (("ann", "annotator"), ("bob", "admin"))]
    known = Tokens(file)
    assert [known.caller(token) for token in made] == [ANN, BOB]
    assert not any(token in file.read_text() for token in made)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("tokens", "ann smith", "viewer"), 1, "caller id 'ann smith' is refused"),
        (("nowhere/tokens", "ann", "viewer"), 1, "cannot write nowhere/tokens"),
        (("tokens", "ann", "king"), 2, "invalid choice: 'king'"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], status: int, why: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert why in done.stderr
    assert "Traceback" not in done.stderr
