"""`python -m services`: run the local stack until ctrl-C."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from defuse.errors import DefuseError
from pydantic import ValidationError

from services.localstack.stack import LocalStack, StackSettings
from services.runtime.settings import report_and_exit


def main() -> None:
    """Start all processes, print their addresses, and run until SIGINT or SIGTERM."""
    try:
        settings = StackSettings()
    except ValidationError as error:
        report_and_exit(error)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with LocalStack(settings, _say) as stack:
            for name, address in stack.addresses().items():
                _say(f"{name:<12} {address}")
            _say(f"logs         {stack.logs}")
            _say(f"ready: clients use {stack.gateway} (export DEFUSE_GATEWAY={stack.gateway}); ctrl-C stops everything")
            stack.watch()
    except KeyboardInterrupt:
        _say("stopped")
    except DefuseError as error:
        sys.exit(f"defuse: {error.message}")


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
