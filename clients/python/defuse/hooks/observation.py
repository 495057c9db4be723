"""One image that a classifier answered, as it is on its way to the gateway."""

import math
from dataclasses import dataclass, field
from datetime import datetime

from defuse.hooks.drops import Dropped
from defuse.v1 import monitor_pb2

MOST_BYTES = 1024 * 1024 - 16 * 1024
_LONGEST_ID = 128


@dataclass(frozen=True, kw_only=True)
class Observation:
    """An image and its answer; what `redact` is given, and may give back changed (`dataclasses.replace`)."""

    model: str
    id: str
    time: datetime
    version: str = ""
    # The classifier's input for one image, or a stored picture; at most one of them is set.
    input: bytes = field(default=b"", repr=False)
    picture: bytes = field(default=b"", repr=False)
    # Of that image, without the batch, and as the Open Inference Protocol names what it is made of.
    shape: tuple[int, ...] = ()
    datatype: str = ""
    scores: tuple[float, ...] = ()

    def to_proto(self) -> monitor_pb2.Observation:
        """Return the message of it; raise Dropped where the gateway would refuse it, and all that is sent with it."""
        if not (0 < len(self.id) <= _LONGEST_ID and self.id.isprintable()):
            raise Dropped("bad_id", f"id {self.id[:_LONGEST_ID]!r} is not 1 to {_LONGEST_ID} printable characters")
        if not all(map(math.isfinite, self.scores)):
            raise Dropped("bad_scores", f"scores of {self.id!r} are no finite numbers")
        if not (self.input or self.picture or self.scores):
            raise Dropped("empty", f"{self.id!r} has neither an image nor scores")
        message = monitor_pb2.Observation(id=self.id, version=self.version, scores=self.scores)
        # A tenth of the time of FromDatetime, which takes the calendar apart.
        message.time.FromMicroseconds(round(self.time.timestamp() * 1e6))
        if self.input:
            message.input = self.input
        elif self.picture:
            message.picture = self.picture
        if (size := message.ByteSize()) > MOST_BYTES:
            raise Dropped("too_large", f"{self.id!r} has {size} bytes, more than a message holds ({MOST_BYTES})")
        return message
