"""Tokens of callers, in a file that knows them by their digests alone: a line `NAME ROLE DIGEST` each.

A name may have several tokens, so that a new one is in use before the old one is taken out.
"""

import hashlib
import hmac
import re
import secrets
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
# So that a scanner of code and logs knows what it has found.
_PREFIX = "defuse_"
_LOOK_EVERY_S = 1.0


class Tokens:
    """Knows callers by their tokens. The file is read again when it has changed; one that is no use changes nothing."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = _stamp(file)
        self._callers = read(file)
        # Tokens that came once, so that no call waits for a digest; never more than the file has.
        self._known: dict[str, Caller] = {}
        self._looked_at = time.monotonic()

    def caller(self, token: str) -> Caller | None:
        """Return whose token it is; None where it is nobody's."""
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._renew()
        caller = self._known.get(token)
        if caller is None and (caller := self._found(token)):
            self._known[token] = caller
        return caller

    def _found(self, token: str) -> Caller | None:
        digest, found = digest_of(token), None
        for known, caller in self._callers.items():  # all of them: the time it takes tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _renew(self) -> None:
        self._looked_at = time.monotonic()
        now = _stamp(self._file)
        if now == self._seen:
            return
        self._seen = now  # also of a file that is no use: that is said once
        try:
            self._callers = read(self._file)
        except DefuseError as error:
            telemetry.log().warning("tokens_not_renewed", error=error.message)
            return
        self._known.clear()
        telemetry.log().info("tokens_renewed", file=str(self._file), tokens=len(self._callers))


def new_token() -> str:
    """Return a token that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """Return what a file knows a token by: of so many random bits SHA-256 gives nothing away."""
    return hashlib.sha256(token.encode()).hexdigest()


def line_of(name: str, role: str, token: str) -> str:
    """Return the line of a token; raise InvalidInput for a name that there cannot be."""
    return f"{names.check_id('caller', name)} {role} {digest_of(token)}"


def read(file: Path) -> dict[str, Caller]:
    """Return the callers of a file by the digests of their tokens; raise InvalidInput that names a line of no use."""
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
    """Return what differs once a file was changed or replaced; None while it is missing."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
