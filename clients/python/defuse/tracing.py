"""The trace that a call belongs to, where the program around makes traces with OpenTelemetry."""

import sys


def metadata() -> list[tuple[str, str]]:
    """Return the caller's trace context as metadata of a call; nothing where no traces are made.

    The package is looked for among what the program has imported: who does not use it does not pay for it.
    """
    propagate = sys.modules.get("opentelemetry.propagate")
    carrier: dict[str, str] = {}
    if propagate:
        propagate.inject(carrier)
    return list(carrier.items())
