"""What the gate asks: a version of a classifier, served by Triton or run here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from defuse.errors import DeadlineExceeded, DefuseError, InvalidInput, Unavailable
from defuse.v1 import model_pb2

from services.arrays import Array


class Version(Protocol):
    """Images in, logits out."""

    model: model_pb2.Model
    # Whether Triton answers.
    served: bool

    def classify(self, images: Array) -> Array:
        """Return the logits (n, k) of images (n, c, h, w) in [0, 1]."""

    def classify_stored(self, images: Array) -> Array:
        """Return the logits (n, k) of stored images (n, h, w, c) uint8."""


class OwnFaults:
    """A candidate whose errors are its own fault: InvalidInput, unless Triton is away."""

    def __init__(self, version: Version) -> None:
        self.model, self.served = version.model, version.served
        self._version = version

    def classify(self, images: Array) -> Array:
        return self._asked(self._version.classify, images)

    def classify_stored(self, images: Array) -> Array:
        return self._asked(self._version.classify_stored, images)

    def _asked(self, ask: Callable[[Array], Array], images: Array) -> Array:
        try:
            return ask(images)
        except (Unavailable, DeadlineExceeded):
            raise
        except DefuseError as error:
            raise InvalidInput(
                f"the candidate does not answer {len(images)} images: {error.message}", reason="NO_ANSWER"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate, and name and version under which Triton serves it; no name where it runs here."""

    name: str
    version: int
    classifier: Version
