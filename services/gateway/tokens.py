"""`python -m services.gateway.tokens FILE NAME ROLE`: create a token for a caller."""

import argparse
import os
import sys
from pathlib import Path

from defuse.errors import DefuseError

from services.gateway.access.tokens import ROLES, line_of, new_token


def main() -> None:
    """Add a token's digest to a file, and print the token, which is not stored."""
    parser = argparse.ArgumentParser(prog="python -m services.gateway.tokens", description=main.__doc__)
    parser.add_argument("file", type=Path, help="what DEFUSE_TOKENS_FILE names; made where it is missing")
    parser.add_argument("name", help="whose token it is")
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
    """Add a line to a file that only its owner may read; the file is replaced atomically."""
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
