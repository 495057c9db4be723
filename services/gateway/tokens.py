"""`python -m services.gateway.tokens FILE NAME ROLE`: creates a caller's token.

Each line of a tokens file is `NAME ROLE DIGEST`. A name may have several tokens, so that a new one can be in use before
the old one is removed.
"""

import argparse
import hashlib
import hmac
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from defuse import names
from defuse.errors import DefuseError, InvalidInput
from defuse.v1 import access_pb2

from services.gateway.access.roles import Caller, Role, role_name
from services.runtime import telemetry

ROLES: Mapping[str, Role] = {role_name(role): role for role in access_pb2.Role.values() if role}
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Lets secret scanners recognise a token in code and logs.
_PREFIX = "defuse_"
_LOOK_EVERY_S = 1.0


class Tokens:
    """Finds callers by token.

    It reloads the file when the file changes, and ignores an invalid one.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = _stamp(file)
        self._callers = read_tokens(file)
        # Tokens seen before, so that most calls compute no digest; never more entries than the file has.
        self._known: dict[str, Caller] = {}
        self._looked_at = time.monotonic()

    def caller(self, token: str) -> Caller | None:
        """Return the caller of a token; None for an unknown one."""
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._renew()
        caller = self._known.get(token)
        if caller is None and (caller := self._found(token)):
            self._known[token] = caller
        return caller

    def _found(self, token: str) -> Caller | None:
        digest, found = digest_of(token), None
        for known, caller in self._callers.items():  # compares with all entries, so that timing reveals nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _renew(self) -> None:
        self._looked_at = time.monotonic()
        now = _stamp(self._file)
        if now == self._seen:
            return
        self._seen = now  # also set for an invalid file, which is logged once
        try:
            self._callers = read_tokens(self._file)
        except DefuseError as error:
            telemetry.log().warning("tokens_not_renewed", error=error.message)
            return
        self._known.clear()
        telemetry.log().info("tokens_renewed", file=str(self._file), tokens=len(self._callers))


def new_token() -> str:
    """Return a new random token."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """Return the SHA-256 digest of a token.

    A token has too many random bits to be guessed from its digest.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def line_of(name: str, role: str, token: str) -> str:
    """Return the line of a tokens file for a token.

    Raises InvalidInput for an invalid name.
    """
    return f"{names.check_id('caller', name)} {role} {digest_of(token)}"


def read_tokens(file: Path) -> dict[str, Caller]:
    """Return the callers of a file by digest.

    Raises InvalidInput that names the first invalid line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the tokens in {file} cannot be read: {error}", reason="BAD_TOKENS_FILE") from error
    callers: dict[str, Caller] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                digest, caller = _parsed(line)
            except InvalidInput as error:
                raise InvalidInput(f"{file}, line {number}: {error.message}", reason="BAD_TOKENS_FILE") from error
            callers[digest] = caller
    return callers


def _parsed(line: str) -> tuple[str, Caller]:
    parts = line.split()
    if len(parts) != 3 or not _DIGEST.fullmatch(parts[2]):
        raise InvalidInput(
            "it is not NAME ROLE DIGEST (SHA-256, hexadecimal); `python -m services.gateway.tokens` adds lines that are"
        )
    name, role, digest = parts
    if role not in ROLES:
        raise InvalidInput(f"there is no role {role!r}; use one of {', '.join(ROLES)}")
    return digest, Caller(name=names.check_id("caller", name), role=ROLES[role])


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return a value that changes whenever the file is changed or replaced.

    Returns None while the file is missing.
    """
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def main() -> None:
    """Add a token's digest to a file, and print the token.

    The token itself is not stored.
    """
    parser = argparse.ArgumentParser(prog="python -m services.gateway.tokens", description=main.__doc__)
    parser.add_argument("file", type=Path, help="the file of DEFUSE_TOKENS_FILE; created when it is missing")
    parser.add_argument("name", help="name of the caller")
    parser.add_argument("role", choices=ROLES)
    asked = parser.parse_args()
    token = new_token()
    try:
        add_line(asked.file, line_of(asked.name, asked.role, token))
    except DefuseError as error:
        sys.exit(f"defuse: {error.message}")
    except OSError as error:
        sys.exit(f"defuse: cannot write {asked.file}: {error.strerror}")
    sys.stdout.write(f"{token}\n")


def add_line(file: Path, line: str) -> None:
    """Add a line to a file that only its owner may read.

    The file is replaced atomically.
    """
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    separator = "\n" if before and not before.endswith("\n") else ""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as written:
            written.write(f"{before}{separator}{line}\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
