"""The command `defuse`: what the client can do, for a terminal and for scripts."""

from defuse.cli.app import main

__all__ = ["main"]
