"""Ids of requests, which make it safe to send one again."""

import time
import uuid
from typing import Any

from defuse.errors import Unavailable
from defuse.steps import Call, Pause, Steps

_RECONNECT_S = 1.0


def new_id() -> str:
    """Return an id that no other request has."""
    return str(uuid.uuid4())


def persistently(call: Call, timeout_s: float) -> Steps[Any]:
    """Return the answer to a request with an id, sent again while the gateway is away, for `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return (yield call)
        except Unavailable:
            if time.monotonic() >= end:
                raise
            yield Pause(seconds=_RECONNECT_S)
