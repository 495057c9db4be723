"""The token by which a gateway knows its caller."""

import getpass
import os
from pathlib import Path

from defuse import tracing
from defuse.errors import InvalidInput
from defuse.loopback import is_loopback
from defuse.tls import SCHEME, is_secure, target_of


class Bearer:
    """Who makes the calls of a connection: whom a token says, by default that of the environment, or nobody known."""

    def __init__(self, token: str | None, address: str) -> None:
        self._credentials = metadata(find_token() if token is None else token, address)

    def metadata(self) -> list[tuple[str, str]]:
        """Return what each call carries, with the trace that it belongs to."""
        return [*self._credentials, *tracing.metadata()]

    def user(self) -> str:
        """Return in whose name something is said; nothing where the gateway knows it by the token."""
        return "" if self._credentials else getpass.getuser()


def find_token() -> str:
    """Return the token in `DEFUSE_TOKEN`, or in the file that `DEFUSE_TOKEN_FILE` names; nothing where none is set."""
    if token := os.environ.get("DEFUSE_TOKEN"):
        return token
    file = os.environ.get("DEFUSE_TOKEN_FILE")
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"DEFUSE_TOKEN_FILE: {file} cannot be read ({error})", reason="BAD_TOKEN") from error


def metadata(token: str, address: str) -> list[tuple[str, str]]:
    """Return what calls to an address carry so that the gateway knows whose they are; nothing without a token.

    Raises InvalidInput where others could read it on its way.
    """
    if not token:
        return []
    if not token.isascii() or not token.isprintable():
        raise InvalidInput(
            "the token has characters that no token has, such as a line break; set it as it was printed",
            reason="BAD_TOKEN",
        )
    if not is_secure(address) and not is_loopback(target_of(address)):
        raise InvalidInput(
            f"the token would travel to {address} in the clear; use {SCHEME}{address}, or call without a token",
            reason="TOKEN_IN_THE_CLEAR",
        )
    return [("authorization", f"Bearer {token}")]
