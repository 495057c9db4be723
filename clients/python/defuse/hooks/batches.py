"""Batches of observations that a gateway takes or refuses as a whole, in messages that it takes."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from defuse.v1 import monitor_pb2
from defuse.v1 import monitor_service_pb2 as pb

MOST_OBSERVATIONS = 256
MOST_BATCH_BYTES = 4 * 1024 * 1024
# A message may have four times as much, but nobody else has the interpreter while it is written.
_MESSAGE_BYTES = 256 * 1024


@dataclass(kw_only=True)
class Batch:
    """Observations of one model whose images and scores have one size, so that all of them are right or none is."""

    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    ids: set[str] = field(default_factory=set)
    # The messages that report it.
    requests: list[pb.ReportRequest] = field(default_factory=list)
    size: int = 0
    _last_size: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.requests.append(pb.ReportRequest(model=f"models/{self.model}", batch_id=self.id))

    def has_room(self, observation: monitor_pb2.Observation, size: int) -> bool:
        """Say whether an observation may be added; an id may be there once."""
        full = len(self.ids) == MOST_OBSERVATIONS or (self.ids and self.size + size > MOST_BATCH_BYTES)
        return not full and observation.id not in self.ids

    def add(self, observation: monitor_pb2.Observation, size: int) -> None:
        if self._last_size and self._last_size + size > _MESSAGE_BYTES:
            self.requests.append(pb.ReportRequest())
            self._last_size = 0
        self.requests[-1].observations.append(observation)
        self.ids.add(observation.id)
        self.size += size
        self._last_size += size

    def without(self, observation_id: str) -> "Batch":
        """Return a batch of the others."""
        others = Batch(model=self.model)
        for request in self.requests:
            for observation in request.observations:
                if observation.id != observation_id:
                    others.add(observation, observation.ByteSize())
        return others


def batches(observations: Iterable[tuple[str, monitor_pb2.Observation]]) -> Iterator[Batch]:
    """Put observations of models together; the same id goes to a batch once, and to another one the second time.

    One that is not of the model's size is refused with its batch: sizes are kept apart.
    """
    begun: dict[tuple[str, int, int, int], Batch] = {}
    for model, observation in observations:
        key = (model, len(observation.input), len(observation.picture), len(observation.scores))
        batch, size = begun.get(key) or Batch(model=model), observation.ByteSize()
        if not batch.has_room(observation, size):
            yield batch
            batch = Batch(model=model)
        batch.add(observation, size)
        begun[key] = batch
    yield from begun.values()
